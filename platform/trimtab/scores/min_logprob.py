"""The least likely token: an answer is as sure as its weakest word."""

from trimtab.scores import Score, ScoreInputs, register


@register("min-logprob")
class MinLogprob(Score):
    """min_t l_t (Manakul et al. 2023 take its negative, "Max(-log p)"). Generates nothing."""

    def score_answer(self, seen: ScoreInputs) -> float:
        """Lowest log-prob."""
        return seen.trace[:, 0].min().item()

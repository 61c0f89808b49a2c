"""Log-probability of the least likely token of an answer."""

from trimtab.scores import Score, ScoreInputs, register


@register("min-logprob")
class MinLogprob(Score):
    """min_t l_t (Manakul et al. 2023 use its negative, "Max(-log p)"). Generates no tokens."""

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the lowest log-probability."""
        return inputs.trace[:, 0].min().item()

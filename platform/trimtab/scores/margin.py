"""The margin: how far ahead of the next one the model saw its first choice."""

from trimtab.scores import Score, ScoreInputs, register


@register("margin")
class Margin(Score):
    """(1/m) sum_t of the largest logit less the second (one of FLaG's features, as a score by itself: ours). Generates
    nothing."""

    def score_answer(self, seen: ScoreInputs) -> float:
        """Mean margin."""
        return seen.trace[:, 2].mean().item()

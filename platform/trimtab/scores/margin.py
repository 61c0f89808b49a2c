"""Margin between the two most likely next tokens."""

from trimtab.scores import Score, ScoreInputs, register


@register("margin")
class Margin(Score):
    """(1/m) sum_t of the difference of the two largest logits. Generates no tokens.

    The margin is one of FLaG's features; its use as a separate score is [trimtab].
    """

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the mean margin."""
        return inputs.trace[:, 2].mean().item()

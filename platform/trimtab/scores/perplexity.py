"""Perplexity: how likely the model found its own answer, token by token."""

from trimtab.scores import Score, ScoreInputs, register


@register("perplexity")
class Perplexity(Score):
    """(1/m) sum_t l_t, minus the logarithm of the perplexity (Ren et al. 2023). Generates nothing."""

    def score_answer(self, seen: ScoreInputs) -> float:
        """Mean log-prob."""
        return seen.trace[:, 0].mean().item()

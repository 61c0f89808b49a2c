"""Perplexity of an answer under the model that generated it."""

from trimtab.scores import Score, ScoreInputs, register


@register("perplexity")
class Perplexity(Score):
    """(1/m) sum_t l_t, minus the logarithm of the perplexity (Ren et al. 2023). Generates no tokens."""

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the mean log-probability."""
        return inputs.trace[:, 0].mean().item()

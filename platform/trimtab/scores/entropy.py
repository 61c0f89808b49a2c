"""Entropies of the next-token distributions along the answer (Manakul et al. 2023)."""

from trimtab.scores import Score, ScoreInputs, register


@register("entropy")
class Entropy(Score):
    """-(1/m) sum_t H_t, H_t the entropy of the distribution that token t was sampled from. Generates no tokens."""

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return minus the mean entropy."""
        return -inputs.trace[:, 1].mean().item()


@register("max-entropy")
class MaxEntropy(Score):
    """-max_t H_t. Generates no tokens."""

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return minus the highest entropy."""
        return -inputs.trace[:, 1].max().item()

"""EigenScore (INSIDE, Chen et al. 2024): how much room the samples' last states take up."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.scores import Need, Score, ScoreInputs, register


@register("eigenscore")
@dataclass(frozen=True)
class EigenScore(Score):
    """-(1/K) log det(S + alpha I) = -(1/K) sum_k log lambda_k, with S [K, K] the covariance of the last states of K samples
    over their d numbers. The paper's equation has S without 1/(d-1); its code, and this, has it, and natural logarithms here
    change the scale alone. Generates the samples.

    Args:
        alpha: what is added to each eigenvalue [paper: 0.001].
        layer: which of the collected layers, 0 being the lowest [paper: one in the middle of the model].
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"states"})
    least: ClassVar[int] = 2

    alpha: float = 1e-3
    layer: int = 0

    def score_answer(self, seen: ScoreInputs) -> float:
        """Minus the mean logarithm of the eigenvalues."""
        states = torch.stack([s.state[self.layer].double() for s in seen.samples])
        spread = torch.cov(states) + self.alpha * torch.eye(len(states), dtype=torch.double)
        return -(torch.linalg.slogdet(spread).logabsdet / len(states)).item()

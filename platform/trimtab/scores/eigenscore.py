"""EigenScore (INSIDE, Chen et al. 2024): volume spanned by the last states of the samples."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.scores import Need, Score, ScoreInputs, register


@register("eigenscore")
@dataclass(frozen=True)
class EigenScore(Score):
    """-(1/K) log det(S + alpha I) = -(1/K) sum_k log lambda_k, with S [K, K] the covariance of the last states of K samples.

    The covariance is over the d components. The paper's equation has S without 1/(d-1); the paper's code has it, as here. The
    natural logarithm changes the scale only. The score requires generated samples.

    Args:
        alpha: constant that is added to each eigenvalue [paper: 0.001].
        layer: index of the layer among the collected layers, 0 for the lowest [paper: a middle layer of the model].
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"states"})
    least: ClassVar[int] = 2

    alpha: float = 1e-3
    layer: int = 0

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return minus the mean logarithm of the eigenvalues."""
        states = torch.stack([s.state[self.layer].double() for s in inputs.samples])
        spread = torch.cov(states) + self.alpha * torch.eye(len(states), dtype=torch.double)
        return -(torch.linalg.slogdet(spread).logabsdet / len(states)).item()

"""Directed representation optimization (Zheng et al. 2024, "On Prompt-Driven Safeguarding") of the answer's first state."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import logsigmoid

from trimtab.objectives import Need, Objective, Scores, register


@register("dro")
@dataclass(frozen=True)
class Dro(Objective):
    """Loss on x, the last hidden state before the answer, and z, its first 4 principal components over base model states.

    loss = -log s(+-[r(z_e) - r(z_0)]) + (h(z_e) - h(z_0))^2 + 1e-3 |rest_e - rest_0|^2 / d, with fixed logistic models r of
    refusal and h of harmfulness on z; + for harmful rows, - for benign ones. Anchors, models and the weight of the rest are the
    paper's. A base model that never refuses provides no refusals to fit r on. Therefore r is fitted to the log-odds of a
    refusal opener, split at their median [trimtab]. A squared term keeps h constant, in the place of the paper's second
    classifier term [trimtab].

    Args:
        dimensions: number of principal components.
        rest: weight of the distance in all other dimensions.
    """

    dimensions: int = 4
    rest: float = 1e-3
    mean: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    axes: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    refusal: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    harm: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def needs(self) -> frozenset[Need]:
        """States, and the odds that the refusal model is fitted to."""
        return frozenset({"states", "odds"})

    def fitted(self, states: Tensor, odds: Tensor, harmful: Tensor) -> "Dro":
        """Compute the principal components of the states [N, d], and fit both logistic models on them."""
        mean = states.mean(0)
        _, values, rows = torch.linalg.svd(states - mean, full_matrices=False)
        # Whitening keeps both models well conditioned.
        axes = rows[: self.dimensions] / (values[: self.dimensions, None] / len(states) ** 0.5).clamp_min(1e-6)
        points = (states - mean) @ axes.T
        refused = (odds > odds.median()).float()
        return replace(
            self, mean=mean, axes=axes, refusal=_fit_logistic(points, refused), harm=_fit_logistic(points, harmful.float())
        )

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B]."""
        moved = scores.states - scores.base_states
        shift = moved @ self.axes.T
        # Both models are linear, so that their change depends on the shift alone.
        refusal = shift @ self.refusal[:-1]
        gain = torch.where(scores.harmful, refusal, -refusal)
        unit = self.axes / self.axes.norm(dim=1, keepdim=True)
        remainder = moved - (moved @ unit.T) @ unit
        return -logsigmoid(gain) + (shift @ self.harm[:-1]) ** 2 + self.rest * remainder.pow(2).mean(1)


def _fit_logistic(points: Tensor, labels: Tensor, ridge: float = 1e-2) -> Tensor:
    """Fit a logistic regression with a small ridge penalty; return weights and bias [n + 1]."""
    inputs = torch.cat([points, points.new_ones(len(points), 1)], 1)
    weights = points.new_zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weights, labels) + ridge * weights[:-1].pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

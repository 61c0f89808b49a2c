"""Directed representation optimisation (Zheng et al. 2024, "On Prompt-Driven Safeguarding"): move the answer's first state."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import logsigmoid

from trimtab.objectives import Need, Objective, Scores, register


@register("dro")
@dataclass(frozen=True)
class Dro(Objective):
    """x: last hidden state before the answer, z its first 4 principal components over the base model's states.

    loss = -log s(+-[r(z_e) - r(z_0)]) + (h(z_e) - h(z_0))^2 + 1e-3 |rest_e - rest_0|^2 / d, with fixed logistic models r of
    refusal and h of harmfulness on z; + for harmful rows, - for benign ones. Anchors, models and the weight of the rest are the
    paper's. A base model that never refuses gives no refusals to fit r on, so r is fitted to its log-odds of opening with one,
    cut at their median [ours]; h stays where it is by a square instead of the paper's second classifier term [ours].

    Args:
        dimensions: principal components.
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
        """Principal components of the states [N, d], and both logistic models on them."""
        mean = states.mean(0)
        _, values, rows = torch.linalg.svd(states - mean, full_matrices=False)
        # Whitened, so that both models are well conditioned.
        axes = rows[: self.dimensions] / (values[: self.dimensions, None] / len(states) ** 0.5).clamp_min(1e-6)
        points = (states - mean) @ axes.T
        refused = (odds > odds.median()).float()
        return replace(self, mean=mean, axes=axes, refusal=_logistic(points, refused), harm=_logistic(points, harmful.float()))

    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B]."""
        moved = scores.states - scores.base_states
        shift = moved @ self.axes.T
        # Both models are linear, so their change depends on the move alone.
        refusal = shift @ self.refusal[:-1]
        wanted = torch.where(scores.harmful, refusal, -refusal)
        unit = self.axes / self.axes.norm(dim=1, keepdim=True)
        left = moved - (moved @ unit.T) @ unit
        return -logsigmoid(wanted) + (shift @ self.harm[:-1]) ** 2 + self.rest * left.pow(2).mean(1)


def _logistic(points: Tensor, labels: Tensor, ridge: float = 1e-2) -> Tensor:
    """Weights and bias [n + 1] of a logistic regression with a small ridge."""
    inputs = torch.cat([points, points.new_ones(len(points), 1)], 1)
    weights = points.new_zeros(inputs.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(inputs @ weights, labels) + ridge * weights[:-1].pow(2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weights.detach()

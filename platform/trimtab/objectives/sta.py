"""Single Token Alignment: likelihood with focal soft weights ("You Only Need One Single Token to Refine Safety Alignment",
Findings of ACL 2026).

Focal weighting and hard filtering are the paper's; exponents, levels and the drift term are ours, as the paper's settings are
not public.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.objectives import Scores, register


@register("sta")
@dataclass(frozen=True)
class Sta:
    """l_i = -(1/T_i) sum_t log p(y_it | e, x_i, y_i<t), p_i = exp(-l_i), f_i = (1 - p_i)^gamma; loss f_i l_i + beta KL_i.

    Args:
        gamma: exponent of the focal weight; 0 gives every row the same weight.
        level: `sequence` weighs whole answers by p_i, `token` each token by its own probability.
        detach: treat the weight as a constant in the gradient.
        beta: weight of the drift from the base model on plain benign rows, in loss per nat.
    """

    gamma: float = 2.0
    level: Literal["sequence", "token"] = "sequence"
    detach: bool = True
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.beta < 0:
            raise UsageError(f"objective sta: gamma ({self.gamma}) and beta ({self.beta}) must not be negative")

    @property
    def needs_drift(self) -> bool:
        """Whether the drift term is on."""
        return self.beta > 0

    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B], in nats."""
        lengths = scores.mask.sum(1)
        if self.level == "token":
            weighted = self._focal(scores.logp) * scores.logp
            loss = -(weighted * scores.mask).sum(1) / lengths
        else:
            nll = -(scores.logp * scores.mask).sum(1) / lengths
            loss = self._focal(-nll) * nll
        return loss + self.beta * scores.drift

    def _focal(self, logp: Tensor) -> Tensor:
        # -expm1 keeps 1 - p exact where p is near 1; the clamp keeps the gradient of a power below 1 finite.
        weight = (-torch.expm1(logp)).clamp_min(1e-6) ** self.gamma
        return weight.detach() if self.detach else weight

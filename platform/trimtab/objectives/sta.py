"""Single Token Alignment: likelihood with focal soft weights.

Reference: "You Only Need One Single Token to Refine Safety Alignment", Findings of ACL 2026. Focal weighting and hard filtering
are the paper's. Exponents, levels and the drift term are trimtab's, as the paper's settings are not public.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.errors import UsageError
from trimtab.objectives import Need, Objective, Scores, register


@register("sta")
@dataclass(frozen=True)
class Sta(Objective):
    """l_i = -(1/T_i) sum_t log p(y_it | e, x_i, y_i<t), p_i = exp(-l_i), f_i = (1 - p_i)^gamma; loss f_i l_i + beta KL.

    Args:
        gamma: exponent of the focal weight; 0 gives every row the same weight.
        level: `sequence` weights whole answers by p_i, `token` each token by its own probability, `decision` whole answers by
            the probability that the first token opens an answer of the right kind (refusal or help).
        detach: treat the weight as a constant in the gradient.
        beta: weight of the drift from the base model: mean KL over the target tokens of plain benign rows, in loss per nat.
    """

    gamma: float = 2.0
    level: Literal["sequence", "token", "decision"] = "sequence"
    detach: bool = True
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.beta < 0:
            raise UsageError(f"objective sta: gamma ({self.gamma}) and beta ({self.beta}) must not be negative")
        if self.level not in ("sequence", "token", "decision"):
            raise UsageError(f"objective sta: level {self.level!r} must be sequence, token or decision")

    @property
    def needs(self) -> frozenset[Need]:
        """Drift if its weight is above zero, odds for the decision level."""
        drift: list[Need] = ["drift"] if self.beta else []
        odds: list[Need] = ["odds"] if self.level == "decision" else []
        return frozenset([*drift, *odds])

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        if self.level == "token":
            weighted = self._focal(scores.logp) * scores.logp
            loss = -(weighted * scores.mask).sum(1) / scores.mask.sum(1)
        elif self.level == "decision":
            right = torch.where(scores.harmful, scores.odds, -scores.odds)
            loss = self._focal(logsigmoid(right)) * scores.nll
        else:
            loss = self._focal(-scores.nll) * scores.nll
        return loss + self.beta * scores.drift if self.beta else loss

    def _focal(self, logp: Tensor) -> Tensor:
        # -expm1 keeps 1 - p exact for p near 1; the clamp keeps the gradient finite for gamma below 1.
        weight = (-torch.expm1(logp)).clamp_min(1e-6) ** self.gamma
        return weight.detach() if self.detach else weight

"""Offline exploration-aware weighting: raises unlikely right answers and lowers likely wrong answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.objectives import Need, Objective, Scores, register


@register("oxa")
@dataclass(frozen=True)
class Oxa(Objective):
    """loss = (1 - p+)^gamma l+  +  push (p-)^gamma (-log(1 - p-)), p = exp(mean log-probability) of an answer.

    The paper proposes to raise low-confidence verified rows and to lower high-confidence wrong ones; the weights are [trimtab].
    They are constants in the gradient.

    Args:
        gamma: exponent of both weights.
        push: weight of the wrong answers.
    """

    gamma: float = 1.0
    push: float = 0.5

    @property
    def needs(self) -> frozenset[Need]:
        """The wrong answers."""
        return frozenset({"rejected"})

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        lifted = (-torch.expm1(-scores.nll)).clamp_min(1e-6).detach() ** self.gamma * scores.nll
        likely = (scores.rejected_logp * scores.rejected_mask).sum(1) / scores.rejected_mask.sum(1)
        # The clamp keeps log(1 - p) finite if a wrong answer is certain.
        wrong = -torch.log(-torch.expm1(likely.clamp_max(-1e-4)))
        return lifted + self.push * likely.exp().detach() ** self.gamma * wrong

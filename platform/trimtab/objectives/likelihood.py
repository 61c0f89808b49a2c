"""Prompt tuning with the mean cross-entropy of the target (Lester et al. 2021)."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.objectives import Objective, Scores, register


@register("likelihood")
@dataclass(frozen=True)
class Likelihood(Objective):
    """l_i = -(1/T_i) sum_t log p(y_it | e, x_i, y_i<t), without weights or filters."""

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B]: mean negative log-probability of each row's target tokens, in nats."""
        return scores.nll

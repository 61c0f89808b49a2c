"""Plain prompt tuning: mean cross-entropy of the target (Lester et al. 2021)."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.objectives import Scores, register


@register("likelihood")
@dataclass(frozen=True)
class Likelihood:
    """l_i = -(1/T_i) sum_t log p(y_it | e, x_i, y_i<t). No weights, no filter of its own."""

    needs_drift = False

    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B]: mean negative log-probability of each row's target tokens, in nats."""
        return -(scores.logp * scores.mask).sum(1) / scores.mask.sum(1)

"""Means with bootstrap intervals, over the seeds of an arm and what they were measured on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from trimtab.evaluate.metrics import Interval

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate(Interval):
    """A figure over `count` cases; one case has no interval, but NaN."""

    count: int

    def mapped(self, function: Callable[[float], float] = exp) -> "Estimate":
        """The same figure on another scale, on which the order stays."""
        return Estimate(function(self.value), function(self.low), function(self.high), self.count)


def mean(values: Tensor, weights: Tensor | None = None, resamples: int = RESAMPLES) -> Estimate:
    """Sum of `values` [seeds, cases] over the sum of `weights` [cases] (one each without), as a mean over seeds.

    Cases are resampled with their weights and, where there are several seeds, crossed with seeds of which one less than there
    are is picked (as evaluate/seeds.py does, which says why). The same values give the same interval.
    """
    seeds, cases = values.shape
    values = values.double()
    weights = torch.ones(cases, dtype=torch.double) if weights is None else weights.double()
    value = (values.sum(1).mean() / weights.sum()).item()
    if cases < 2:
        return Estimate(value, float("nan"), float("nan"), cases)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(seeds, (resamples, max(1, seeds - 1)), generator=generator)
    drawn = torch.randint(cases, (resamples, cases), generator=generator)
    times = torch.zeros(resamples, cases, dtype=torch.double)
    times.scatter_add_(1, drawn, torch.ones(resamples, cases, dtype=torch.double))
    by_seed = (times @ values.T) / (times @ weights)[:, None]
    low, high = torch.quantile(by_seed.gather(1, picked).mean(1), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(value, low, high, cases)

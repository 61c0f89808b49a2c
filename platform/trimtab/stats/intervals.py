"""95 % confidence intervals: Wilson score for rates, bootstrap for means over seeds and cases."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, hypot, sqrt

import torch
from torch import Tensor

Z95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval [low, high]; both ends are the value where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low < self.high else "")


@dataclass(frozen=True)
class Rate(Interval):
    """A share of `count` cases."""

    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def compute_wilson_interval(hits: float, count: int) -> Rate:
    """A share with Wilson's score interval (1927), which holds for small counts and for shares near 0 and 1.

    `hits` may be a mean, as over seeds."""
    if count == 0:
        return Rate(float("nan"), 0.0, 1.0, 0)
    share = hits / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def average_rates(a: Rate, b: Rate) -> Rate:
    """Mean of two independent shares, its interval made of theirs.

    This is Newcombe's hybrid of score intervals (1998, method 10) for half a sum in place of a difference (MOVER, Zou and
    Donner 2008). A bootstrap has nothing to resample on a side that is all right or all wrong."""
    if not a.count or not b.count:
        return Rate(float("nan"), 0.0, 1.0, 0)
    mean = (a.value + b.value) / 2
    below, above = hypot(a.value - a.low, b.value - b.low) / 2, hypot(a.high - a.value, b.high - b.value) / 2
    return Rate(mean, mean - below, mean + above, a.count + b.count)


RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate(Interval):
    """A figure over `count` cases; one case has no interval, but NaN."""

    count: int

    def map_values(self, function: Callable[[float], float] = exp) -> "Estimate":
        """The same figure on another scale, on which the order stays."""
        return Estimate(function(self.value), function(self.low), function(self.high), self.count)


def bootstrap_mean(values: Tensor, weights: Tensor | None = None, resamples: int = RESAMPLES) -> Estimate:
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

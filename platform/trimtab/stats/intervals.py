"""95 % confidence intervals: values with their ends, and the Wilson score for rates. Free of heavy imports."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, hypot, sqrt

Z95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval [low, high]; both ends equal the value, or are NaN, if there is no interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low < self.high else "")


@dataclass(frozen=True)
class Rate(Interval):
    """A share of `count` cases with its 95 % interval."""

    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def compute_wilson_interval(hits: float, count: int) -> Rate:
    """Compute a rate with its Wilson score interval (1927), which is valid for small counts and for rates near 0 and 1.

    Args:
        hits: number of hits; may be fractional, such as a mean over seeds.
        count: number of cases.

    Returns:
        The rate; NaN with the interval [0, 1] if `count` is 0.
    """
    if count == 0:
        return Rate(float("nan"), 0.0, 1.0, 0)
    share = hits / count
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Rate(share, max(0.0, center - half), min(1.0, center + half), count)


def average_rates(a: Rate, b: Rate) -> Rate:
    """Compute the mean of two independent rates, with an interval derived from theirs.

    The interval is Newcombe's hybrid of score intervals (1998, method 10), applied to half a sum instead of a difference
    (MOVER, Zou and Donner 2008). A bootstrap would have no variation to resample on a side that is all correct or all wrong.

    Args:
        a: first rate.
        b: second rate.

    Returns:
        The mean over `a.count + b.count` cases; NaN with the interval [0, 1] if either rate has no cases.
    """
    if not a.count or not b.count:
        return Rate(float("nan"), 0.0, 1.0, 0)
    mean = (a.value + b.value) / 2
    below, above = hypot(a.value - a.low, b.value - b.low) / 2, hypot(a.high - a.value, b.high - b.value) / 2
    return Rate(mean, mean - below, mean + above, a.count + b.count)


@dataclass(frozen=True)
class Estimate(Interval):
    """A mean over `count` cases with its 95 % interval, which is NaN for a single case."""

    count: int

    def map_values(self, function: Callable[[float], float] = exp) -> "Estimate":
        """Apply a monotonically increasing function to the value and to both ends of the interval."""
        return Estimate(function(self.value), function(self.low), function(self.high), self.count)

"""Figures with intervals."""

from dataclasses import dataclass
from math import hypot, sqrt

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


def wilson(hits: float, count: int) -> Rate:
    """A share with Wilson's score interval (1927), which holds for small counts and for shares near 0 and 1.

    `hits` may be a mean, as over seeds."""
    if count == 0:
        return Rate(float("nan"), 0.0, 1.0, 0)
    share = hits / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def mean_of_rates(a: Rate, b: Rate) -> Rate:
    """Mean of two independent shares, its interval made of theirs.

    This is Newcombe's hybrid of score intervals (1998, method 10) for half a sum in place of a difference (MOVER, Zou and
    Donner 2008). A bootstrap has nothing to resample on a side that is all right or all wrong."""
    if not a.count or not b.count:
        return Rate(float("nan"), 0.0, 1.0, 0)
    mean = (a.value + b.value) / 2
    below, above = hypot(a.value - a.low, b.value - b.low) / 2, hypot(a.high - a.value, b.high - b.value) / 2
    return Rate(mean, mean - below, mean + above, a.count + b.count)

"""Rates with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

Z95 = 1.959964


@dataclass(frozen=True)
class Rate:
    """A share of `count` cases with its 95 % interval [low, high]."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(hits: int, count: int) -> Rate:
    """A share with Wilson's score interval (1927), which holds for small counts and for shares near 0 and 1."""
    if count == 0:
        return Rate(float("nan"), 0.0, 1.0, 0)
    share = hits / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def mean_of_rates(a: Sequence[bool], b: Sequence[bool], resamples: int = 2000, seed: int = 0) -> Rate:
    """Mean of two shares with a bootstrap interval, each side resampled by itself."""
    if not a or not b:
        return Rate(float("nan"), 0.0, 1.0, 0)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(resamples)
    for side in (a, b):
        values = torch.tensor(side, dtype=torch.float32)
        picks = torch.randint(len(side), (resamples, len(side)), generator=generator)
        total += values[picks].mean(1) / 2
    low, high = torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()
    return Rate((sum(a) / len(a) + sum(b) / len(b)) / 2, low, high, len(a) + len(b))

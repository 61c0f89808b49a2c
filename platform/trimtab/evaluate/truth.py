"""Calibration of risks, and what answering less would gain, from risks [N] and labels [N] of one test set.

Made-up answers are the positives; how well risks rank them is in weighted.py.
"""

from dataclasses import dataclass

import numpy as np

from trimtab.evaluate.weighted import Floats, Labels

BINS = 10


def ece(risk: Floats, made_up: Labels) -> float:
    """Expected calibration error over 10 bins of equal width (Naeini et al. 2015)."""
    return sum(abs(b.risk - b.frequency) * b.count for b in reliability(risk, made_up)) / len(risk)


@dataclass(frozen=True)
class Bin:
    """Answers with like risks: their mean risk, the share of them that is made up, and their number."""

    risk: float
    frequency: float
    count: int


def reliability(risk: Floats, made_up: Labels) -> list[Bin]:
    """The bins of a reliability plot, without the empty ones."""
    at = np.minimum((risk * BINS).astype(int), BINS - 1)
    chosen = [(at == index) for index in range(BINS)]
    return [Bin(float(risk[c].mean()), float(made_up[c].mean()), int(c.sum())) for c in chosen if c.any()]


def coverage(risk: Floats, made_up: Labels) -> tuple[Floats, Floats]:
    """The risk-coverage curve: shares [N] of answers given, the least risky first, and the share of made-up ones among them.

    Answers of equal risk are given in no order: each counts with the mean of its equals.
    """
    order = np.argsort(risk, kind="stable")
    _, group, sizes = np.unique(risk[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=made_up[order]) / sizes)[group]
    given = np.arange(1, len(risk) + 1)
    return given / len(risk), np.cumsum(expected) / given

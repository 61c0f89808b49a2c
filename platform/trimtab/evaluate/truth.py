"""How well risks tell made-up answers from right ones: ranking, calibration, and what answering less would gain.

Made-up answers are the positives. All figures come from risks [N] and labels [N] of one test set, nothing is chosen on it.
"""

from dataclasses import dataclass

import numpy as np

from trimtab.errors import UsageError
from trimtab.evaluate import weighted
from trimtab.evaluate.metrics import Interval
from trimtab.evaluate.weighted import CATCHING, Figure, Floats, Labels

RESAMPLES, BINS = 1000, 10


@dataclass(frozen=True)
class Truth:
    """Figures of one detector on one test set of `count` answers, `made_up` of them made up.

    auroc, auprc: of ranking made-up answers above right ones. fpr95: share of right answers flagged where 95 % of the made-up
    ones are caught. ece: mean distance between risk and frequency over 10 equal bins; `ece_raw` the same before calibration.
    aurc: mean error rate over all shares of answers that one would give, the least risky first; less is better.
    """

    auroc: Interval
    auprc: Interval
    fpr95: Interval
    ece: float
    ece_raw: float
    aurc: Interval
    count: int
    made_up: int


def measure(risk: Floats, made_up: Labels, raw: Floats | None = None, seed: int = 0) -> Truth:
    """All figures of risks [N]; `raw` [N] are the risks before calibration.

    Raises UsageError where the labels are all of one class, for which ranking means nothing.
    """
    if made_up.all() or not made_up.any():
        raise UsageError("the test answers are all of one class; a detector is measured on right answers and made-up ones")
    return Truth(
        auroc=bootstrap(weighted.auroc, risk, made_up, seed),
        auprc=bootstrap(weighted.auprc, risk, made_up, seed),
        fpr95=bootstrap(weighted.fpr95, risk, made_up, seed),
        ece=ece(risk, made_up),
        ece_raw=ece(risk if raw is None else raw, made_up),
        aurc=bootstrap(weighted.aurc, risk, made_up, seed),
        count=len(risk),
        made_up=int(made_up.sum()),
    )


def bootstrap(figure: Figure, risk: Floats, made_up: Labels, seed: int = 0) -> Interval:
    """A figure of evaluate/weighted.py with its percentile interval over answers drawn with replacement, each class by itself
    so that none is empty."""
    generator = np.random.default_rng(seed)
    times = np.zeros((RESAMPLES, len(risk)), dtype=np.int64)
    for side in (np.flatnonzero(made_up), np.flatnonzero(~made_up)):
        times[:, side] = generator.multinomial(len(side), np.full(len(side), 1 / len(side)), RESAMPLES)
    low, high = np.quantile(figure(risk, made_up, times), [0.025, 0.975])
    return Interval(float(figure(risk, made_up, np.ones((1, len(risk)), dtype=np.int64))[0]), float(low), float(high))


def auroc(risk: Floats, made_up: Labels) -> float:
    """Share of pairs of a made-up and a right answer that the risk puts in order, ties counting half."""
    right = np.sort(risk[~made_up])
    below = np.searchsorted(right, risk[made_up], side="left")
    upto = np.searchsorted(right, risk[made_up], side="right")
    return float((below + upto).mean() / 2 / len(right))


def auprc(risk: Floats, made_up: Labels) -> float:
    """Average precision at catching made-up answers."""
    flagged, caught = _curve(risk, made_up)
    precision, recall = caught / flagged, caught / caught[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def fpr95(risk: Floats, made_up: Labels) -> float:
    """Share of right answers flagged at the highest threshold that catches 95 % of the made-up ones."""
    flagged, caught = _curve(risk, made_up)
    at = np.argmax(caught >= CATCHING * caught[-1])
    return float((flagged[at] - caught[at]) / (~made_up).sum())


def _curve(risk: Floats, made_up: Labels) -> tuple[Floats, Floats]:
    """For each threshold, from the highest risk down: answers flagged, and made-up ones among them."""
    order = np.argsort(-risk, kind="stable")
    last = np.append(np.flatnonzero(np.diff(risk[order])), len(risk) - 1)
    return (last + 1).astype(np.float64), np.cumsum(made_up[order])[last].astype(np.float64)


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


def aurc(risk: Floats, made_up: Labels) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017)."""
    return float(coverage(risk, made_up)[1].mean())

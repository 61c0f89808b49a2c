"""Metrics of detectors: ranking (AUROC, AUPRC, FPR95, AURC), calibration and risk-coverage.

Arrays are risks [N] and labels [N] of one test set; made-up answers are the positives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
ResampleCounts = NDArray[np.integer]
Metric = Callable[[Floats, Labels, ResampleCounts], Floats]

CATCHING = 0.95


def compute_auroc(risk: Floats, made_up: Labels, times: ResampleCounts) -> Floats:
    """Share of pairs of a made-up and a right answer that the risk puts in order, ties counting half."""
    wrong, right = _sort_by_risk(risk, made_up, times)
    below = right.cumsum(1) - right / 2
    return _divide((wrong * below).sum(1), wrong.sum(1) * right.sum(1))


def compute_auprc(risk: Floats, made_up: Labels, times: ResampleCounts) -> Floats:
    """Average precision at catching made-up answers."""
    wrong, right = (side[:, ::-1] for side in _sort_by_risk(risk, made_up, times))
    caught = wrong.cumsum(1)
    precision = _divide(caught, caught + right.cumsum(1), empty=0.0)
    return _mask_single_class(_divide((wrong * precision).sum(1), caught[:, -1]), right)


def compute_fpr95(risk: Floats, made_up: Labels, times: ResampleCounts) -> Floats:
    """Share of right answers flagged at the highest threshold that catches 95 % of the made-up ones."""
    wrong, right = (side[:, ::-1] for side in _sort_by_risk(risk, made_up, times))
    caught, alarms = wrong.cumsum(1), right.cumsum(1)
    at = (caught >= CATCHING * caught[:, -1:]).argmax(1)
    return _mask_single_class(_divide(alarms[np.arange(len(alarms)), at], alarms[:, -1]), wrong)


def compute_aurc(risk: Floats, made_up: Labels, times: ResampleCounts) -> Floats:
    """Area under the risk-coverage curve. Answers of equal risk are given in no order: each counts with their mean.

    Of c answers with error rate p after n given ones with e errors, the j-th adds (e + j p) / (n + j), which is
    p + (e - p n) / (n + j); so a sum over them is one of harmonic numbers.
    """
    wrong, right = _sort_by_risk(risk, made_up, times)
    count = wrong + right
    given, errors = count.cumsum(1), wrong.cumsum(1)
    before, rate = given - count, _divide(wrong, count, empty=0.0)
    harmonic = np.append(0.0, (1 / np.arange(1, given[:, -1].max() + 1)).cumsum())
    steps = harmonic[given.astype(np.int64)] - harmonic[before.astype(np.int64)]
    return _mask_single_class(_divide((wrong + (errors - wrong - rate * before) * steps).sum(1), given[:, -1]), wrong, right)


METRICS: dict[str, Metric] = {"auroc": compute_auroc, "auprc": compute_auprc, "fpr95": compute_fpr95, "aurc": compute_aurc}


def _sort_by_risk(risk: Floats, made_up: Labels, times: ResampleCounts) -> tuple[Floats, Floats]:
    """Made-up and right answers drawn of each of G different risks, from the lowest up: [R, G] each."""
    order = np.argsort(risk, kind="stable")
    first = np.append(0, np.flatnonzero(np.diff(risk[order])) + 1)
    drawn, wrong = times[:, order].astype(np.float64), made_up[order]
    return np.add.reduceat(drawn * wrong, first, axis=1), np.add.reduceat(drawn * ~wrong, first, axis=1)


def _divide(above: Floats, below: Floats, empty: float = float("nan")) -> Floats:
    return np.divide(above, below, out=np.full_like(above, empty), where=below > 0)


def _mask_single_class(figures: Floats, *sides: Floats) -> Floats:
    """NaN for resamples that hold nothing of a side."""
    return np.where(np.all([side.sum(1) > 0 for side in sides], axis=0), figures, np.nan)


BINS = 10


def compute_ece(risk: Floats, made_up: Labels) -> float:
    """Expected calibration error over 10 bins of equal width (Naeini et al. 2015)."""
    return sum(abs(b.risk - b.frequency) * b.count for b in compute_calibration_bins(risk, made_up)) / len(risk)


@dataclass(frozen=True)
class CalibrationBin:
    """Answers with like risks: their mean risk, the share of them that is made up, and their number."""

    risk: float
    frequency: float
    count: int


def compute_calibration_bins(risk: Floats, made_up: Labels) -> list[CalibrationBin]:
    """The bins of a reliability plot, without the empty ones."""
    at = np.minimum((risk * BINS).astype(int), BINS - 1)
    chosen = [(at == index) for index in range(BINS)]
    return [CalibrationBin(float(risk[c].mean()), float(made_up[c].mean()), int(c.sum())) for c in chosen if c.any()]


def compute_risk_coverage(risk: Floats, made_up: Labels) -> tuple[Floats, Floats]:
    """The risk-coverage curve: shares [N] of answers given, the least risky first, and the share of made-up ones among them.

    Answers of equal risk are given in no order: each counts with the mean of its equals.
    """
    order = np.argsort(risk, kind="stable")
    _, group, sizes = np.unique(risk[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=made_up[order]) / sizes)[group]
    given = np.arange(1, len(risk) + 1)
    return given / len(risk), np.cumsum(expected) / given

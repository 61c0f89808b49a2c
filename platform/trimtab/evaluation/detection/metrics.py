"""Metrics of detectors: ranking (AUROC, AUPRC, FPR95, AURC), calibration and risk-coverage.

All functions take the risks [N] and labels [N] of one test set. Made-up answers are the positives. The ranking metrics also
take bootstrap counts [R, N], how often each of R resamples drew each answer, and return one value per resample [R]. A resample
that lacks a class gives NaN.
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


def compute_auroc(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    """Compute the share of pairs (made-up answer, correct answer) that the risk ranks correctly; ties count half."""
    wrong, right = _sort_by_risk(risk, made_up, counts)
    below = right.cumsum(1) - right / 2
    return _divide((wrong * below).sum(1), wrong.sum(1) * right.sum(1))


def compute_auprc(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    """Compute the average precision of detecting made-up answers."""
    wrong, right = (side[:, ::-1] for side in _sort_by_risk(risk, made_up, counts))
    caught = wrong.cumsum(1)
    precision = _divide(caught, caught + right.cumsum(1), empty=0.0)
    return _mask_single_class(_divide((wrong * precision).sum(1), caught[:, -1]), right)


def compute_fpr95(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    """Compute the false positive rate at the highest threshold that detects at least 95 % of the made-up answers."""
    wrong, right = (side[:, ::-1] for side in _sort_by_risk(risk, made_up, counts))
    caught, alarms = wrong.cumsum(1), right.cumsum(1)
    threshold = (caught >= CATCHING * caught[:, -1:]).argmax(1)
    return _mask_single_class(_divide(alarms[np.arange(len(alarms)), threshold], alarms[:, -1]), wrong)


def compute_aurc(risk: Floats, made_up: Labels, counts: ResampleCounts) -> Floats:
    """Compute the area under the risk-coverage curve; answers of equal risk count with their mean error rate.

    Of c tied answers with error rate p that follow n answers with e errors, the j-th adds (e + j p) / (n + j), which is
    p + (e - p n) / (n + j). The sum over the ties is therefore a difference of harmonic numbers.
    """
    wrong, right = _sort_by_risk(risk, made_up, counts)
    size = wrong + right
    covered, errors = size.cumsum(1), wrong.cumsum(1)
    before, rate = covered - size, _divide(wrong, size, empty=0.0)
    harmonic = np.append(0.0, (1 / np.arange(1, covered[:, -1].max() + 1)).cumsum())
    steps = harmonic[covered.astype(np.int64)] - harmonic[before.astype(np.int64)]
    return _mask_single_class(_divide((wrong + (errors - wrong - rate * before) * steps).sum(1), covered[:, -1]), wrong, right)


METRICS: dict[str, Metric] = {"auroc": compute_auroc, "auprc": compute_auprc, "fpr95": compute_fpr95, "aurc": compute_aurc}


def _sort_by_risk(risk: Floats, made_up: Labels, counts: ResampleCounts) -> tuple[Floats, Floats]:
    """Count the drawn made-up and correct answers, [R, G] each, at each of the G distinct risks in ascending order."""
    order = np.argsort(risk, kind="stable")
    first = np.append(0, np.flatnonzero(np.diff(risk[order])) + 1)
    drawn, wrong = counts[:, order].astype(np.float64), made_up[order]
    return np.add.reduceat(drawn * wrong, first, axis=1), np.add.reduceat(drawn * ~wrong, first, axis=1)


def _divide(numerator: Floats, denominator: Floats, empty: float = float("nan")) -> Floats:
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator > 0)


def _mask_single_class(values: Floats, *classes: Floats) -> Floats:
    """Set the values [R] of resamples that lack one of the classes [R, G] to NaN."""
    return np.where(np.all([counts.sum(1) > 0 for counts in classes], axis=0), values, np.nan)


BINS = 10


def compute_ece(risk: Floats, made_up: Labels) -> float:
    """Compute the expected calibration error over 10 bins of equal width (Naeini et al. 2015)."""
    return sum(abs(b.risk - b.frequency) * b.count for b in compute_calibration_bins(risk, made_up)) / len(risk)


@dataclass(frozen=True)
class CalibrationBin:
    """Answers of one bin of a reliability plot.

    Attributes:
        risk: mean risk.
        frequency: share of made-up answers.
        count: number of answers.
    """

    risk: float
    frequency: float
    count: int


def compute_calibration_bins(risk: Floats, made_up: Labels) -> list[CalibrationBin]:
    """Compute the non-empty bins of a reliability plot, in ascending order of risk."""
    bins = np.minimum((risk * BINS).astype(int), BINS - 1)
    masks = [(bins == index) for index in range(BINS)]
    return [CalibrationBin(float(risk[m].mean()), float(made_up[m].mean()), int(m.sum())) for m in masks if m.any()]


def compute_risk_coverage(risk: Floats, made_up: Labels) -> tuple[Floats, Floats]:
    """Compute the risk-coverage curve, which covers answers in ascending order of risk.

    Answers of equal risk count with their mean error rate.

    Returns:
        Coverage [N], and the share of made-up answers among the covered ones [N].
    """
    order = np.argsort(risk, kind="stable")
    _, group, sizes = np.unique(risk[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=made_up[order]) / sizes)[group]
    covered = np.arange(1, len(risk) + 1)
    return covered / len(risk), np.cumsum(expected) / covered

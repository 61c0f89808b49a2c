"""ROC, risk-coverage and reliability curves of a detector over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.evaluation.detection.metrics import CalibrationBin, Floats, Labels, compute_calibration_bins, compute_risk_coverage
from trimtab.evaluation.detection.pooling import SeedRisks

GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class DetectionCurves:
    """Curves of a detector, averaged over its seeds.

    Attributes:
        name: name of the head or score.
        roc: true positive rate [101] at the false positive rates GRID; made-up answers are the positives.
        coverage: share of made-up answers [101] among the answers covered at the coverages GRID, the least risky first.
        before: calibration bins before calibration.
        after: calibration bins after calibration.
    """

    name: str
    roc: Floats
    coverage: Floats
    before: list[CalibrationBin]
    after: list[CalibrationBin]


def compute_curves(name: str, tests: Sequence[SeedRisks]) -> DetectionCurves:
    """Compute the curves of a detector.

    The calibration bins pool the answers of all test parts; an answer in the test parts of several seeds counts once for each.

    Args:
        name: name of the head or score.
        tests: risks on the test part of each seed.
    """
    made_up = np.concatenate([t.made_up for t in tests])
    return DetectionCurves(
        name,
        np.mean([compute_roc(t.risk, t.made_up) for t in tests], axis=0),
        np.mean([compute_coverage(t.risk, t.made_up) for t in tests], axis=0),
        compute_calibration_bins(np.concatenate([t.raw for t in tests]), made_up),
        compute_calibration_bins(np.concatenate([t.risk for t in tests]), made_up),
    )


def compute_roc(risk: Floats, made_up: Labels) -> Floats:
    """Compute the true positive rate [101] at the false positive rates GRID.

    If several thresholds have the same false positive rate, the highest true positive rate counts. Values between thresholds
    are interpolated linearly.
    """
    thresholds = np.unique(risk)[::-1]
    right, wrong = np.sort(risk[~made_up]), np.sort(risk[made_up])
    alarms = 1 - np.searchsorted(right, thresholds, side="left") / len(right)
    caught = 1 - np.searchsorted(wrong, thresholds, side="left") / len(wrong)
    # Of points with equal x, only the highest may remain: the interpolated curve would drop otherwise.
    last = np.append(np.diff(alarms) > 0, True)
    start = [0.0] if alarms[last][0] > 0 else []
    return np.interp(GRID, np.append(start, alarms[last]), np.append(start, caught[last]))


def compute_coverage(risk: Floats, made_up: Labels) -> Floats:
    """Compute the share of made-up answers [101] among the answers covered at the coverages GRID, the least risky first.

    The value at coverage 0 is that of the first answer.
    """
    shares, errors = compute_risk_coverage(risk, made_up)
    return np.interp(GRID, shares, errors)

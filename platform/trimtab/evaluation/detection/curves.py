"""The curves of a detector over its seeds: ROC, risk-coverage and reliability, as points that a picture or a file can hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.evaluation.detection.metrics import CalibrationBin, Floats, Labels, compute_calibration_bins, compute_risk_coverage
from trimtab.evaluation.detection.pooling import SeedRisks

GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class DetectionCurves:
    """Means over seeds. `roc`: share of made-up answers caught where so many right ones are flagged; `coverage`: share of
    made-up ones among so many answers given, the least risky first; both at GRID. Bins of risk before and after calibration."""

    name: str
    roc: Floats
    coverage: Floats
    before: list[CalibrationBin]
    after: list[CalibrationBin]


def compute_curves(name: str, tests: Sequence[SeedRisks]) -> DetectionCurves:
    """The curves of a detector. Bins hold the answers of all test parts: one that several seeds test counts as often."""
    made_up = np.concatenate([t.made_up for t in tests])
    return DetectionCurves(
        name,
        np.mean([compute_roc(t.risk, t.made_up) for t in tests], axis=0),
        np.mean([compute_coverage(t.risk, t.made_up) for t in tests], axis=0),
        compute_calibration_bins(np.concatenate([t.raw for t in tests]), made_up),
        compute_calibration_bins(np.concatenate([t.risk for t in tests]), made_up),
    )


def compute_roc(risk: Floats, made_up: Labels) -> Floats:
    """Share of made-up answers caught [101] where the shares GRID of right ones are flagged.

    At a share that some thresholds flag it is the most that they catch; between them runs a straight line."""
    thresholds = np.unique(risk)[::-1]
    right, wrong = np.sort(risk[~made_up]), np.sort(risk[made_up])
    alarms = 1 - np.searchsorted(right, thresholds, side="left") / len(right)
    caught = 1 - np.searchsorted(wrong, thresholds, side="left") / len(wrong)
    # Of points above each other only the highest is kept, or the line would fall back at them.
    last = np.append(np.diff(alarms) > 0, True)
    start = [0.0] if alarms[last][0] > 0 else []
    return np.interp(GRID, np.append(start, alarms[last]), np.append(start, caught[last]))


def compute_coverage(risk: Floats, made_up: Labels) -> Floats:
    """Share of made-up answers [101] among the shares GRID of answers given, the least risky first; at 0 that of the first."""
    shares, errors = compute_risk_coverage(risk, made_up)
    return np.interp(GRID, shares, errors)

"""Reserved labels of live traffic, which no detector is trained on: calibration of a new detector, and evidence of its gate."""

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.detection.calibration import compute_supported_thresholds, compute_thresholds, fit_platt
from trimtab.detection.detector import Detector, build_detector
from trimtab.detection.detector_card import MOST_REFERENCE
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.evaluation.detection.metrics import compute_auroc
from trimtab.evaluation.detection.pooling import compute_mean, draw_resamples, estimate_paired_difference
from trimtab.evaluation.gate import Gain
from trimtab.jobs.promote.detector_metrics import build_risks, compute_risk_at

# Labels of each class that calibration and gate need.
MIN_LABELS = 10


def select_evidence(reserved: SignalDataset) -> Tensor:
    """Return the reserved rows [n] with a label of a rater that the operator trusts."""
    return reserved.has_trusted_label.nonzero()[:, 0]


def has_enough_labels(reserved: SignalDataset, rows: Tensor) -> bool:
    """Return whether rows have at least `MIN_LABELS` labels of each class."""
    right = int((reserved.truthful[rows] == 1).sum())
    return min(right, len(rows) - right) >= MIN_LABELS


def calibrate_on_reserved(detector: Detector, reserved: SignalDataset) -> Detector:
    """Calibrate a detector on the reserved labels of trusted raters, if there are enough.

    The risks are those of live traffic then. A threshold for whose level there are too few labels keeps its place in the order
    of the risks, but rises so far that no larger share of the reserved right answers is above it.

    Args:
        detector: detector that was trained without the reserved rows.
        reserved: reserved rows.

    Returns:
        The calibrated detector, or the same one if there are too few labels or its scores do not rank them.
    """
    rows = select_evidence(reserved)
    if detector.card.label_thresholds or not has_enough_labels(reserved, rows):
        return detector
    truthful = reserved.truthful[rows]
    # The log-odds of a right answer are an affine map of the score, and so is their calibration.
    slope, offset = fit_platt(_compute_log_odds(compute_risk_at(detector, reserved, rows)), truthful).tolist()
    if slope <= 0:
        return detector
    weights = detector.calibration * slope + torch.tensor([0.0, offset], dtype=detector.calibration.dtype)
    calibrated = replace(detector, calibration=weights)
    risk = compute_risk_at(calibrated, reserved, rows)
    supported, highest = compute_supported_thresholds(risk, truthful), compute_thresholds(risk, truthful)
    converted = {
        name: torch.sigmoid(-(slope * _compute_log_odds(torch.tensor(value)) + offset)).item()
        for name, value in detector.card.thresholds.items()
    }
    thresholds = {
        name: supported[name] if name in supported else max(value, highest[name]) for name, value in converted.items()
    }
    return build_detector(detector.head, detector.normalizer, weights, replace(detector.card, thresholds=thresholds))


def add_reference_risks(detector: Detector, data: SignalDataset, rows: Tensor) -> Detector:
    """Record the risks of rows that a detector was not trained on, with which servers compare those of live answers.

    Args:
        detector: detector of answers.
        data: data set of the rows.
        rows: rows [n] of the data set.
    """
    risks = compute_risk_at(detector, data, rows).double().sort().values
    count = min(MOST_REFERENCE, len(risks))
    # Evenly spaced in the order of the risks.
    chosen = risks[torch.linspace(0, len(risks) - 1, count).round().long()] if count else risks
    reference = [round(risk, 6) for risk in chosen.tolist()]
    return replace(detector, card=replace(detector.card, reference_risks=reference))


def compare_on_reserved(detector: Detector, champion: Detector, reserved: SignalDataset, rival: str) -> Gain | None:
    """Compare a detector with the champion on reserved labels of trusted raters.

    Neither was trained on them, and they are a random share of the labeled answers.

    Args:
        detector: new detector.
        champion: current champion.
        reserved: reserved rows.
        rival: name of the champion.

    Returns:
        The comparison, or None if there are too few labels.
    """
    rows = select_evidence(reserved)
    if not has_enough_labels(reserved, rows):
        return None
    own, other = (build_risks(reserved, rows, compute_risk_at(d, reserved, rows)) for d in (detector, champion))
    difference = estimate_paired_difference(compute_auroc, [own], [other], draw_resamples(reserved.groups, 1))
    values = [compute_mean(compute_auroc, [risks]) for risks in (own, other)]
    return Gain("AUROC", values[0], rival, values[1], difference, len(rows), "labels of trusted raters")


def _compute_log_odds(risk: Tensor) -> Tensor:
    """Compute the log-odds of a right answer from risks."""
    return -torch.logit(risk.double(), 1e-9)

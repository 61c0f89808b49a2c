"""Final fits of a detector with several labels: one head per label, and thresholds of each label and of the highest risk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trimtab.detection.calibration import compute_supported_thresholds
from trimtab.detection.label_heads import MAX_LABELS, combine_heads
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.jobs.detect.final_fit import FinalFit
from trimtab.jobs.detect.further_sets import FurtherSetResult, measure_by_source


@dataclass(frozen=True)
class LabelFit:
    """Detector of several labels.

    Attributes:
        head: heads of the labels with their calibrations.
        thresholds: thresholds of each label.
        combined: fit whose risks are the highest ones of all labels, with their thresholds.
        results: results of the out-of-fold risks by label.
    """

    head: nn.Module
    thresholds: Mapping[str, dict[str, float]]
    combined: FinalFit
    results: list[FurtherSetResult]


def check_labels(data: SignalDataset) -> list[str]:
    """Return the labels of a data set to train on; empty if it has fewer than two.

    Raises:
        UsageError: if there are too many labels.
    """
    labels = data.list_labels()
    if len(labels) > MAX_LABELS:
        raise UsageError(f"the data set has {len(labels)} labels; a detector has at most {MAX_LABELS}. Merge some of them")
    return labels if len(labels) > 1 else []


def fit_labels(data: SignalDataset, labels: list[str], fit: Callable[[SignalDataset], FinalFit]) -> LabelFit:
    """Fit one head per label.

    Args:
        data: data set with labels.
        labels: names of the labels.
        fit: fits a detector on a data set, in the same folds for all labels.

    Raises:
        UsageError: if a label has too few rows.
    """
    fits: dict[str, FinalFit] = {}
    selected = {label: data.select_label(label) for label in labels}
    for label, rows in selected.items():
        try:
            fits[label] = fit(rows)
        except UsageError as error:
            raise UsageError(f"label {label}: {error}") from error
    by_row = {label: dict(zip(f.rows.tolist(), f.risk, strict=True)) for label, f in fits.items()}
    first = fits[labels[0]]
    risk = torch.stack([_order(by_row[label], first.rows) for label in labels]).max(0).values
    head = combine_heads({label: f.trained.head for label, f in fits.items()}, [f.trained.calibration for f in fits.values()])
    # The heads are calibrated, and so is the riskiest of them, by definition.
    thresholds = compute_supported_thresholds(risk, data.truthful[first.rows])
    trained = replace(first.trained, calibration=torch.tensor([1.0, 0.0]), thresholds=thresholds)
    results = [
        replace(measure_by_source(selected[label], f.rows, f.risk, f.trained.thresholds)[0], name=f"label {label}")
        for label, f in fits.items()
    ]
    limits = {label: f.trained.thresholds for label, f in fits.items()}
    return LabelFit(head, limits, replace(first, trained=trained, risk=risk), results)


def _order(risks: Mapping[int, Tensor], rows: Tensor) -> Tensor:
    return torch.stack([risks[row] for row in rows.tolist()])

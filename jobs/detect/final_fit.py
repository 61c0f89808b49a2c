"""Final fit of a selected detector on all rows, with out-of-fold risks.

Each row gets its out-of-fold risk from a detector that was not trained on its group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.detection.calibration import compute_supported_thresholds, compute_thresholds
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.detection.training import DataSplits, TrainedDetector, split_data
from trimtab.errors import UsageError
from trimtab.jobs.detect.model_selection import FitTask, compute_risks, has_two_classes, run_fits

FOLDS = 5
# Number of fits: the folds and the final detector.
FITS = FOLDS + 1
# Labels of each class with which the thresholds are those of live traffic alone.
MIN_LIVE_LABELS = 20
# Seed of the folds; the seeds of the splits count from 0.
SEED = 1000


@dataclass(frozen=True)
class FinalFit:
    """Detector trained on all rows but those for calibration.

    Attributes:
        trained: detector, with thresholds from the out-of-fold risks.
        splits: rows that it was trained and calibrated on.
        rows: labeled rows [n] of the data set.
        risk: their out-of-fold risks [n].
    """

    trained: TrainedDetector
    splits: DataSplits
    rows: Tensor
    risk: Tensor


def fit_final_detector(
    selected: TrainedDetector,
    data: SignalDataset,
    validation: float,
    labels: float,
    tick: Callable[[], None],
    windows: Sequence[Tensor | None] = (),
    spread: Tensor | None = None,
) -> FinalFit:
    """Train a selected candidate on the whole data set and on each of `FOLDS` folds.

    Args:
        selected: detector that was selected on validation.
        data: data set of N rows.
        validation: share of the groups for model selection and calibration in each fit.
        labels: share of the training labels to use.
        tick: callback that is called after each of `FITS` fits.
        windows: features of the windows of each prompt; empty if windows are not read.
        spread: semantic entropies [N] if there are samples.

    Raises:
        UsageError: if a part of a fold lacks a class.
    """

    def split(seed: int, test: float, offset: float = 0.0) -> DataSplits:
        columns = data.psi, data.traces, data.truthful, data.groups
        return split_data(*columns, seed, validation, test, labels, spread, offset, windows=windows, repeats=data.repeats)

    folds = [split(SEED, 1 / FOLDS, number / FOLDS) for number in range(FOLDS)]
    final = split(selected.seed, 0.0)
    if not all(has_two_classes(part) for parts in (*folds, final) for part in (parts.train, parts.validation)):
        raise UsageError(f"a fold of {len(data.keys)} rows is all of one class. Collect more rows")
    tasks = [FitTask(selected.candidate, SEED, fold) for fold in folds]
    *fold_fits, trained = run_fits([*tasks, FitTask(selected.candidate, selected.seed, final)], tick)
    risks = [compute_risks(fit, fold.test, fold.test_indices) for fit, fold in zip(fold_fits, folds, strict=True)]
    rows, risk = torch.cat([fold.test_indices for fold in folds]), torch.cat([torch.from_numpy(risk.risk) for risk in risks])
    # Detectors of answers have a threshold of every level.
    compute = compute_supported_thresholds if data.meta.subject == "prompt" else compute_thresholds
    is_used = _select_for_thresholds(data, rows)
    thresholds = compute(risk[is_used], data.truthful[rows][is_used])
    return FinalFit(replace(trained, thresholds=thresholds), final, rows, risk)


def _select_for_thresholds(data: SignalDataset, rows: Tensor) -> Tensor:
    """Return which rows [n] set the thresholds: those of live traffic if they have enough labels, else all."""
    is_live, truthful = data.is_live[rows], data.truthful[rows]
    counts = [int((is_live & (truthful == label)).sum()) for label in (0, 1)]
    return is_live if min(counts) >= MIN_LIVE_LABELS else torch.ones_like(is_live)

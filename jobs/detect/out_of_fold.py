"""Out-of-fold risks of a selected detector: each row is scored by a detector that was not trained on its group."""

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.detection.training import Candidate, split_data
from trimtab.errors import UsageError
from trimtab.jobs.collect.signal_dataset import SignalDataset
from trimtab.jobs.detect.model_selection import FitTask, compute_risks, has_two_classes, run_fits

FOLDS = 5
# Seed of the folds; the seeds of the splits count from 0.
SEED = 1000


def compute_out_of_fold_risks(
    candidate: Candidate, data: SignalDataset, validation: float, tick: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Train a candidate on each of `FOLDS` folds, and compute the risks of the rows that the fold leaves out.

    Args:
        candidate: configuration of the detector.
        data: data set of N rows.
        validation: share of the groups for model selection and calibration in each fold.
        tick: callback that is called after each fit.

    Returns:
        Rows [n] of the data set that have labels, and their risks [n].

    Raises:
        UsageError: if a part of a fold lacks a class.
    """
    folds = [
        split_data(data.psi, data.traces, data.truthful, data.groups, SEED, validation, 1 / FOLDS, offset=number / FOLDS)
        for number in range(FOLDS)
    ]
    if not all(has_two_classes(part) for fold in folds for part in (fold.train, fold.validation)):
        raise UsageError(f"a fold of {len(data.keys)} rows is all of one class. Collect more rows")
    trained = run_fits([FitTask(candidate, SEED, fold) for fold in folds], tick)
    risks = [compute_risks(detector, fold.test, fold.test_indices) for detector, fold in zip(trained, folds, strict=True)]
    return torch.cat([fold.test_indices for fold in folds]), torch.cat([torch.from_numpy(risk.risk) for risk in risks])

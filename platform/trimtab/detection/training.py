"""Training of detectors on collected answers: split, normalize, fit, select on validation, calibrate (METHODS 2, protocol).

Test answers are not used in any of these steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import heads
from trimtab.data.prompt import hash_to_fraction
from trimtab.detection.calibration import compute_risk, compute_thresholds, fit_platt
from trimtab.detection.detector import normalize_features
from trimtab.detection.signals import TRACE, compute_trace_features
from trimtab.errors import UsageError
from trimtab.heads import DetectorRows, Head, compute_auroc, predict_scores

# tau_l is this quantile of the log-probabilities of the training answers (METHODS; trimtab's choice).
LOW = 0.05


@dataclass(frozen=True)
class Candidate:
    """Candidate configuration of a detector.

    Attributes:
        head: registered name of the head.
        layers: indices of the layers in psi.
        settings: settings of the head.
    """

    head: str
    layers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test rows of one seed.

    Attributes:
        train: training rows.
        validation: validation rows.
        test: test rows.
        test_indices: indices of the test rows in the data set.
        train_indices: indices of the training rows in the data set.
        validation_indices: indices of the validation rows in the data set.
        low: threshold tau_l of the training rows.
        normalizer: mean and standard deviation of phi over the training rows [2, 7].
    """

    train: DetectorRows
    validation: DetectorRows
    test: DetectorRows
    test_indices: Tensor
    train_indices: Tensor
    validation_indices: Tensor
    low: float
    normalizer: Tensor


@dataclass(frozen=True)
class TrainedDetector:
    """Trained head of one seed with its calibration.

    Attributes:
        candidate: configuration of the detector.
        seed: seed of the split and of the training.
        head: trained head.
        validation: AUROC on the validation rows.
        calibration: slope and offset of Platt scaling [2].
        thresholds: risk threshold by false positive rate.
    """

    candidate: Candidate
    seed: int
    head: Head
    validation: float
    calibration: Tensor
    thresholds: dict[str, float]


def split_data(
    psi: Tensor,
    traces: Sequence[Tensor],
    truthful: Tensor,
    groups: Sequence[str],
    seed: int,
    validation: float,
    test: float,
    labels: float = 1.0,
    spread: Tensor | None = None,
    offset: float = 0.0,
    windows: Sequence[Tensor | None] = (),
    times: Tensor | None = None,
    repeats: Tensor | None = None,
) -> DataSplits:
    """Split N answers by group and normalize them with the statistics of the training part.

    All answers of a group are in the same part.

    Args:
        psi: features [N, L, 3d].
        traces: N tensors [m, 3] of log-probability, entropy and margin of each token.
        truthful: labels [N], NaN for unlabeled answers, which are used for training only.
        groups: group of each answer.
        seed: seed of the split.
        validation: share of the groups in the validation part.
        test: share of the groups in the test part.
        labels: share of the training labels to keep.
        spread: semantic entropies [N], or None if no samples were collected.
        offset: position of the test part among the groups in the order of the seed, from 0 to 1. The test parts at multiples
            of `test` are disjoint.
        windows: features [W, L, 3d] of the windows of each prompt, None for prompts of one window; empty if they are not read.
        times: times [N] of the answers, to test on the latest ones and validate on those before; NaN for answers without a
            time, which are split at random. None splits all answers at random.
        repeats: number of times that each answer counts in training [N].

    Raises:
        UsageError: if the training part is empty.
    """
    fractions = torch.tensor([(hash_to_fraction(group, seed) - offset) % 1 for group in groups], dtype=torch.double)
    if times is not None:
        fractions = _order_by_time(fractions, times, groups)
    labeled = ~truthful.isnan()
    is_test, is_validation = (fractions < test) & labeled, (fractions >= test) & (fractions < test + validation) & labeled
    is_train = fractions >= test + validation
    if not is_train.any():
        raise UsageError(
            f"seed {seed} leaves no answers to train on: the data set has {len(set(groups))} groups. Collect more groups"
        )
    logp = torch.cat([trace[:, 0] for trace, train in zip(traces, is_train.tolist(), strict=True) if train])
    # numpy, because torch.quantile accepts at most 16 million numbers.
    low = float(np.quantile(logp.numpy(), LOW)) if len(logp) else 0.0
    phi = compute_traces(traces, low)
    normalizer = torch.stack([phi[is_train].mean(0), phi[is_train].std(0).clamp(min=1e-6)])
    z = normalize_features(phi, normalizer)
    rows = DetectorRows(psi, z, truthful, torch.empty(0) if spread is None else spread, windows)
    train = is_train.nonzero()[:, 0]
    train = train if repeats is None else train.repeat_interleave(repeats[train])
    splits = DataSplits(
        rows[train],
        rows[is_validation],
        rows[is_test],
        is_test.nonzero()[:, 0],
        train,
        is_validation.nonzero()[:, 0],
        low,
        normalizer,
    )
    return splits if labels >= 1 else drop_labels(splits, groups, seed, labels)


def _order_by_time(fractions: Tensor, times: Tensor, groups: Sequence[str]) -> Tensor:
    """Replace the fractions [N] of the groups with a time by their rank, the latest first."""
    timed = sorted((time, group) for time, group in zip(times.tolist(), groups, strict=True) if not isnan(time))
    latest = {group: time for time, group in timed}
    ranks = {group: rank for rank, group in enumerate(sorted(latest, key=latest.__getitem__, reverse=True))}
    ordered = [ranks[group] / len(ranks) if group in ranks else -1.0 for group in groups]
    by_time = torch.tensor(ordered, dtype=torch.double)
    return torch.where(by_time < 0, fractions, by_time)


def drop_labels(rows: DataSplits, groups: Sequence[str], seed: int, labels: float) -> DataSplits:
    """Keep only a share of the training labels, selected by group; a larger share includes each smaller one.

    Args:
        rows: splits to change.
        groups: group of each answer in the data set.
        seed: seed of the selection.
        labels: share of the labels to keep.
    """
    trained = [groups[int(index)] for index in rows.train_indices.tolist()]
    hidden = [hash_to_fraction(f"label {group}", seed) >= labels for group in trained]
    truthful = rows.train.truthful.masked_fill(torch.tensor(hidden, dtype=torch.bool), float("nan"))
    return replace(rows, train=replace(rows.train, truthful=truthful))


def build_foreign_rows(psi: Tensor, traces: Sequence[Tensor], truthful: Tensor, rows: DataSplits) -> DetectorRows:
    """Build rows of another data set with the tau_l and normalizer of existing splits.

    Args:
        psi: features [N, L, 3d].
        traces: N tensors [m, 3].
        truthful: labels [N].
        rows: splits that the detectors were trained on.
    """
    return DetectorRows(psi, normalize_features(compute_traces(traces, rows.low), rows.normalizer), truthful)


def train_detector(candidate: Candidate, rows: DataSplits, seed: int) -> TrainedDetector:
    """Fit a candidate on the training rows and calibrate it on the validation rows.

    Args:
        candidate: configuration of the detector.
        rows: splits of the data set.
        seed: seed of the training.

    Raises:
        UsageError: if a part lacks right or made-up answers.
    """
    torch.manual_seed(seed)
    train, validation = select_features(rows.train, candidate), select_features(rows.validation, candidate)
    head = heads.get_head(candidate.head)(train.psi.shape[-1] // 3, len(candidate.layers), **candidate.settings)
    head.fit(train, validation, seed)
    score = predict_scores(head, validation)
    calibration = fit_platt(score, validation.truthful)
    thresholds = compute_thresholds(compute_risk(score, calibration), validation.truthful)
    return TrainedDetector(candidate, seed, head, compute_auroc(score, validation.truthful), calibration, thresholds)


def select_features(rows: DetectorRows, candidate: Candidate) -> DetectorRows:
    """Restrict rows to the layers of a candidate."""
    return rows.select_layers(candidate.layers)


def compute_traces(traces: Sequence[Tensor], low: float) -> Tensor:
    """Compute the trace features of N answers.

    Args:
        traces: N tensors [m, 3] of log-probability, entropy and margin of each token; [0, 3] for prompts.
        low: threshold tau_l.

    Returns:
        phi [N, 7], zeros for prompts.
    """
    nothing = torch.zeros(len(TRACE))
    return torch.stack(
        [compute_trace_features(trace[:, 0], trace[:, 1], trace[:, 2], low) if len(trace) else nothing for trace in traces]
    )

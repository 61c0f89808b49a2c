"""Learning a detector from collected answers: split, normalise, fit, choose on validation, calibrate (METHODS 2, protocol).

Nothing here looks at a test answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import heads
from trimtab.data.prompt import hash_to_fraction
from trimtab.detection.calibration import compute_risk, compute_thresholds, fit_platt
from trimtab.detection.detector import normalize_features
from trimtab.detection.signals import compute_trace_features
from trimtab.errors import UsageError
from trimtab.heads import DetectorRows, Head, compute_auroc, predict_scores

# tau_l is this quantile of the training answers' log-probs [METHODS, ours].
LOW = 0.05


@dataclass(frozen=True)
class Candidate:
    """One way to make a detector: a head with its settings, on some of the collected layers (indices into psi)."""

    head: str
    layers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class DataSplits:
    """The rows of one seed: what is learned from, chosen on, and reported on, with tau_l and the normaliser [2, 7] of the
    training rows. `at`, `trained` and `validation_at` are the indices of the test, training and validation rows in the data
    set."""

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
    """A head of one seed with its AUROC on validation, and what makes its scores risks."""

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
) -> DataSplits:
    """Split N answers by their groups, so that none is on two sides, and normalise by the training part.

    `psi` [N, L, 3d], `traces` N times [m, 3], `truthful` [N] with NaN for unlabelled answers, which only train. Of the training
    labels the share `labels` is kept. `spread` [N] are semantic entropies, where samples were collected.

    Raises UsageError where nothing is left to learn from.
    """
    place = torch.tensor([hash_to_fraction(group, seed) for group in groups])
    known = ~truthful.isnan()
    tests, validations = (place < test) & known, (place >= test) & (place < test + validation) & known
    trains = place >= test + validation
    if not trains.any():
        raise UsageError(
            f"seed {seed} leaves no answers to learn from: there are {len(set(groups))} groups; collect more of them"
        )
    logp = torch.cat([trace[:, 0] for trace, train in zip(traces, trains.tolist(), strict=True) if train])
    # numpy's, as torch's takes 16 million numbers at most.
    low = float(np.quantile(logp.numpy(), LOW))
    phi = compute_traces(traces, low)
    normaliser = torch.stack([phi[trains].mean(0), phi[trains].std(0).clamp(min=1e-6)])
    z = normalize_features(phi, normaliser)
    rows = DetectorRows(psi, z, truthful, torch.empty(0) if spread is None else spread)
    made = DataSplits(
        rows[trains],
        rows[validations],
        rows[tests],
        tests.nonzero()[:, 0],
        trains.nonzero()[:, 0],
        validations.nonzero()[:, 0],
        low,
        normaliser,
    )
    return made if labels >= 1 else drop_labels(made, groups, seed, labels)


def drop_labels(rows: DataSplits, groups: Sequence[str], seed: int, labels: float) -> DataSplits:
    """The same parts with the share `labels` of the training labels, by group; a larger share holds a smaller one."""
    trained = [groups[int(at)] for at in rows.train_indices.tolist()]
    hidden = [hash_to_fraction(f"label {group}", seed) >= labels for group in trained]
    known = rows.train.truthful.masked_fill(torch.tensor(hidden, dtype=torch.bool), float("nan"))
    return replace(rows, train=replace(rows.train, truthful=known))


def build_foreign_rows(psi: Tensor, traces: Sequence[Tensor], truthful: Tensor, rows: DataSplits) -> DetectorRows:
    """Answers [N] of another data set, as detectors that learned from `rows` read them: with their tau_l and normaliser."""
    return DetectorRows(psi, normalize_features(compute_traces(traces, rows.low), rows.normalizer), truthful)


def train_detector(candidate: Candidate, rows: DataSplits, seed: int) -> TrainedDetector:
    """Fit a candidate, and calibrate it on validation. Raises UsageError where a class is missing."""
    torch.manual_seed(seed)
    train, validation = select_features(rows.train, candidate), select_features(rows.validation, candidate)
    head = heads.get_head(candidate.head)(train.psi.shape[-1] // 3, len(candidate.layers), **candidate.settings)
    head.fit(train, validation, seed)
    score = predict_scores(head, validation)
    made = fit_platt(score, validation.truthful)
    limits = compute_thresholds(compute_risk(score, made), validation.truthful)
    return TrainedDetector(candidate, seed, head, compute_auroc(score, validation.truthful), made, limits)


def select_features(rows: DetectorRows, candidate: Candidate) -> DetectorRows:
    """The rows as a candidate sees them: at its layers only."""
    return DetectorRows(rows.psi[:, list(candidate.layers)], rows.phi, rows.truthful, rows.spread)


def compute_traces(traces: Sequence[Tensor], low: float) -> Tensor:
    """phi [N, 7] of N answers by their tokens, [m, 3] each, and tau_l."""
    return torch.stack([compute_trace_features(trace[:, 0], trace[:, 1], trace[:, 2], low) for trace in traces])

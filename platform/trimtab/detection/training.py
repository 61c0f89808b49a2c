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
from trimtab.data.prompt import fraction
from trimtab.detection import calibration, signals
from trimtab.detection.detector import normalised
from trimtab.errors import UsageError
from trimtab.heads import Head, Rows, auroc, scores

# tau_l is this quantile of the training answers' log-probs [METHODS, ours].
LOW = 0.05


@dataclass(frozen=True)
class Candidate:
    """One way to make a detector: a head with its settings, on some of the collected layers (indices into psi)."""

    head: str
    layers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Parts:
    """The rows of one seed: what is learned from, chosen on, and reported on, with tau_l and the normaliser [2, 7] of the
    training rows. `at`, `trained` and `validation_at` are the indices of the test, training and validation rows in the data
    set."""

    train: Rows
    validation: Rows
    test: Rows
    at: Tensor
    trained: Tensor
    validation_at: Tensor
    low: float
    normaliser: Tensor


@dataclass(frozen=True)
class Learned:
    """A head of one seed with its AUROC on validation, and what makes its scores risks."""

    candidate: Candidate
    seed: int
    head: Head
    validation: float
    calibration: Tensor
    thresholds: dict[str, float]


def parts(
    psi: Tensor,
    traces: Sequence[Tensor],
    truthful: Tensor,
    groups: Sequence[str],
    seed: int,
    validation: float,
    test: float,
    labels: float = 1.0,
    spread: Tensor | None = None,
) -> Parts:
    """Split N answers by their groups, so that none is on two sides, and normalise by the training part.

    `psi` [N, L, 3d], `traces` N times [m, 3], `truthful` [N] with NaN for unlabelled answers, which only train. Of the training
    labels the share `labels` is kept. `spread` [N] are semantic entropies, where samples were collected.

    Raises UsageError where nothing is left to learn from.
    """
    place = torch.tensor([fraction(group, seed) for group in groups])
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
    phi = traced(traces, low)
    normaliser = torch.stack([phi[trains].mean(0), phi[trains].std(0).clamp(min=1e-6)])
    z = normalised(phi, normaliser)
    rows = Rows(psi, z, truthful, torch.empty(0) if spread is None else spread)
    made = Parts(
        rows[trains],
        rows[validations],
        rows[tests],
        tests.nonzero()[:, 0],
        trains.nonzero()[:, 0],
        validations.nonzero()[:, 0],
        low,
        normaliser,
    )
    return made if labels >= 1 else with_labels(made, groups, seed, labels)


def with_labels(rows: Parts, groups: Sequence[str], seed: int, labels: float) -> Parts:
    """The same parts with the share `labels` of the training labels, by group; a larger share holds a smaller one."""
    trained = [groups[int(at)] for at in rows.trained.tolist()]
    hidden = [fraction(f"label {group}", seed) >= labels for group in trained]
    known = rows.train.truthful.masked_fill(torch.tensor(hidden, dtype=torch.bool), float("nan"))
    return replace(rows, train=replace(rows.train, truthful=known))


def foreign(psi: Tensor, traces: Sequence[Tensor], truthful: Tensor, rows: Parts) -> Rows:
    """Answers [N] of another data set, as detectors that learned from `rows` read them: with their tau_l and normaliser."""
    return Rows(psi, normalised(traced(traces, rows.low), rows.normaliser), truthful)


def learn(candidate: Candidate, rows: Parts, seed: int) -> Learned:
    """Fit a candidate, and calibrate it on validation. Raises UsageError where a class is missing."""
    torch.manual_seed(seed)
    train, validation = seen(rows.train, candidate), seen(rows.validation, candidate)
    head = heads.get(candidate.head)(train.psi.shape[-1] // 3, len(candidate.layers), **candidate.settings)
    head.fit(train, validation, seed)
    score = scores(head, validation)
    made = calibration.platt(score, validation.truthful)
    limits = calibration.thresholds(calibration.risk(score, made), validation.truthful)
    return Learned(candidate, seed, head, auroc(score, validation.truthful), made, limits)


def seen(rows: Rows, candidate: Candidate) -> Rows:
    """The rows as a candidate sees them: at its layers only."""
    return Rows(rows.psi[:, list(candidate.layers)], rows.phi, rows.truthful, rows.spread)


def traced(traces: Sequence[Tensor], low: float) -> Tensor:
    """phi [N, 7] of N answers by their tokens, [m, 3] each, and tau_l."""
    return torch.stack([signals.trace(trace[:, 0], trace[:, 1], trace[:, 2], low) for trace in traces])

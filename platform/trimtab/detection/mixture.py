"""Weights of collected and live data sets in training, chosen by cross-validation on labels of live traffic [ours].

After a shift, old rows can help or harm. A logistic probe on the states shows which at little cost, whatever head is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.data.prompt import hash_to_fraction
from trimtab.detection.merged_dataset import find_common_layers, find_reserved_rows
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.heads import compute_auroc
from trimtab.stats.logistic import compute_logits, fit_logistic

# Weights of collected rows against live ones (1): as they are, fewer, and none.
SHARES = (1.0, 0.25, 0.0625, 0.0)
FOLDS, MIN_LABELS = 5, 10
# Labels of live rows without which collected rows are not left out: a detector needs 50.
MIN_ALONE = 60
# Rows of each kind that the probe reads, and its penalty.
MOST_ROWS, PENALTY = 1000, 0.01


@dataclass(frozen=True)
class Mixture:
    """Weights of the data sets of a training.

    Attributes:
        weights: how often the rows of each data set count; 0 leaves it out.
        aurocs: cross-validated AUROC on live labels by the weight of collected rows; empty if there are too few labels.
    """

    weights: list[int]
    aurocs: Mapping[float, float]

    def __str__(self) -> str:
        if not self.aurocs:
            return "too few labels of trusted raters to choose weights of the data sets; all rows count once"
        tried = ", ".join(f"{share:g}: {auroc:.3f}" for share, auroc in self.aurocs.items())
        return f"weights of the data sets {self.weights}, by the weight of a collected row (AUROC on live labels) {tried}"


def choose_mixture(folders: Mapping[str, SignalDataset], reserved_fraction: float) -> Mixture:
    """Choose the weights of data sets by the AUROC of a probe on trusted labels of live traffic that are not reserved.

    Args:
        folders: data sets by folder.
        reserved_fraction: share of the live requests that is reserved for calibration and gates.

    Returns:
        The mixture with the highest AUROC; all rows count once if there are too few labels, or data sets of one kind only.

    Raises:
        UsageError: if the data sets cannot be merged.
    """
    layer, sets = max(find_common_layers(folders)), list(folders.values())
    equal = Mixture([1] * len(sets), {})
    is_live = [bool(data.is_live.any()) for data in sets]
    if all(is_live) or not any(is_live):
        return equal
    collected = [_select_labeled(data, layer) for data, live in zip(sets, is_live, strict=True) if not live]
    live = [_select_live(data, layer, reserved_fraction) for data, live in zip(sets, is_live, strict=True) if live]
    old_states, old_right = (torch.cat(parts)[:MOST_ROWS] for parts in list(zip(*collected, strict=True))[:2])
    states, right, folds = (torch.cat(parts)[-MOST_ROWS:] for parts in zip(*live, strict=True))
    if min(int((right == 1).sum()), int((right == 0).sum())) < MIN_LABELS:
        return equal
    shares = [share for share in SHARES if share or len(right) >= MIN_ALONE]
    aurocs = {share: _cross_validate(states, right, folds, old_states, old_right, share) for share in shares}
    best = max(shares, key=lambda share: (round(aurocs[share], 3), share))
    counts = [round(1 / best) if live and best else 1 for live in is_live]
    return Mixture([count if live or best else 0 for count, live in zip(counts, is_live, strict=True)], aurocs)


def _select_labeled(data: SignalDataset, layer: int) -> tuple[Tensor, Tensor]:
    """Return the states [n, 3d] and labels [n] of labeled rows, in the order of a hash, so that the first ones are random."""
    rows: list[int] = (~data.truthful.isnan()).nonzero()[:, 0].tolist()
    chosen = torch.tensor(sorted(rows, key=lambda row: hash_to_fraction(data.keys[row], 0)), dtype=torch.long)
    return data.psi[chosen, data.meta.layers.index(layer)], data.truthful[chosen]


def _select_live(data: SignalDataset, layer: int, reserved_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states [n, 3d], labels [n] and folds [n] of rows with trusted labels that are not reserved, by time."""
    usable = data.has_trusted_label & data.is_live & ~find_reserved_rows(data, reserved_fraction)
    rows = usable.nonzero()[:, 0]
    rows = rows[data.times[rows].argsort()]
    folds = torch.tensor([int(hash_to_fraction(data.groups[row], 1) * FOLDS) for row in rows.tolist()])
    return data.psi[rows, data.meta.layers.index(layer)], data.truthful[rows], folds


def _cross_validate(states: Tensor, right: Tensor, folds: Tensor, old_states: Tensor, old_right: Tensor, share: float) -> float:
    """Compute the AUROC of out-of-fold scores of live rows, with collected rows of weight `share` in each training."""
    scores = torch.zeros(len(right), dtype=torch.double)
    for fold in range(FOLDS):
        inside = folds != fold
        labels = right[inside] if share == 0 else torch.cat([right[inside], old_right])
        if len(labels.unique()) < 2:
            continue
        rows = states[inside] if share == 0 else torch.cat([states[inside], old_states])
        weights = torch.cat([torch.ones(int(inside.sum())), torch.full((len(rows) - int(inside.sum()),), share)])
        fitted = fit_logistic(rows, labels == 1, PENALTY, weights)
        scores[~inside] = compute_logits(fitted, states[~inside])
    return compute_auroc(scores, right)

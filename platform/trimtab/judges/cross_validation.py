"""Nested cross-validation of the refusal head.

The layer and the penalty are chosen inside the training folds, so that the metrics come from answers that neither the fit nor
the choice has used. Rows that share a prompt or an answer stay in one fold, because labeled sets contain one answer under
several prompts, and stock refusals many times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from trimtab.data.prompt import hash_to_fraction
from trimtab.errors import UsageError
from trimtab.generation_types import Progress
from trimtab.judges.human_labels import LabeledAnswer
from trimtab.judges.refusal_head import fit_weights
from trimtab.stats.logistic import compute_logits
from trimtab.text.normalization import normalize_words

FOLDS, INNER = 5, 3
PENALTIES = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class LabeledStates:
    """Hidden states of answers with their labels.

    Attributes:
        states: hidden states [n, layers, d].
        refused: labels, bool [n].
        taught: whether a head may be fitted on the row, bool [n]. Other rows are only predicted.
        groups: group of each row, n integers. The rows of one group stay in one fold.
    """

    states: Tensor
    refused: Tensor
    taught: Tensor
    groups: Sequence[int]

    def at(self, mask: Tensor) -> "LabeledStates":
        """Return the rows at which `mask`, bool [n], is true."""
        groups = [g for g, selected in zip(self.groups, mask.tolist(), strict=True) if selected]
        return LabeledStates(self.states[mask], self.refused[mask], self.taught[mask], groups)


@dataclass(frozen=True)
class HeadChoice:
    """Hyperparameters of a head.

    Attributes:
        layer: index into the layers of the table.
        l2: L2 penalty.
    """

    layer: int
    l2: float


def group_rows(rows: Sequence[LabeledAnswer]) -> list[int]:
    """Group rows that share a prompt or an answer, directly or through other rows.

    Returns:
        The group number of each row.
    """
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for text in (f"prompt {normalize_words(row.prompt)}", f"answer {normalize_words(row.answer)}"):
            parents[root(i)] = root(first.setdefault(text, i))
    return [root(i) for i in range(len(rows))]


def assign_folds(table: LabeledStates, count: int) -> Tensor:
    """Assign the groups to folds in a fixed pseudo-random order.

    Args:
        table: n rows.
        count: number of folds.

    Returns:
        The fold of each row, int64 [n], from 0 to `count` - 1.

    Raises:
        UsageError: if there are fewer groups than folds.
    """
    order = sorted(set(table.groups), key=lambda g: (hash_to_fraction(str(g), 0), g))
    if len(order) < count:
        raise UsageError(f"{len(order)} groups of labeled answers with different prompts are too few. Give at least {count}")
    fold = {group: i % count for i, group in enumerate(order)}
    return torch.tensor([fold[g] for g in table.groups])


def choose_head(table: LabeledStates, count: int = INNER) -> HeadChoice:
    """Choose the layer and the penalty with the lowest out-of-fold log loss.

    Args:
        table: rows to cross-validate on.
        count: number of folds.

    Raises:
        UsageError: if there are fewer groups than folds, or a training fold lacks one class.
    """
    fold = assign_folds(table, count)
    best, best_loss = HeadChoice(0, PENALTIES[-1]), float("inf")
    for layer in range(table.states.shape[1]):
        for l2 in PENALTIES:
            loss = sum(_compute_loss(table, fold == i, HeadChoice(layer, l2)) for i in range(count))
            if loss < best_loss:
                best, best_loss = HeadChoice(layer, l2), loss
    return best


def predict_out_of_fold(table: LabeledStates, progress: Progress | None = None) -> Tensor:
    """Predict each row with a head that was fitted and chosen without the fold of the row.

    Args:
        table: n rows.
        progress: callback with the number of folds done and in total, plus one for the final fit.

    Returns:
        Log-odds of a refusal, float64 [n].

    Raises:
        UsageError: if there are fewer groups than folds, or a training fold lacks one class.
    """
    fold = assign_folds(table, FOLDS)
    logits = torch.zeros(len(table.groups), dtype=torch.float64)
    for i in range(FOLDS):
        left_out = fold == i
        rest = table.at(~left_out)
        choice = choose_head(rest)
        logits[left_out] = compute_logits(fit_head(rest, choice), table.states[left_out, choice.layer])
        if progress:
            progress(i + 1, FOLDS + 1)
    return logits


def fit_head(table: LabeledStates, choice: HeadChoice) -> Tensor:
    """Fit a head on the rows of `table.taught`.

    Args:
        table: rows to fit on.
        choice: layer and penalty of the head.

    Returns:
        Weights and bias, float64 [d + 1].

    Raises:
        UsageError: if the rows lack one class.
    """
    return fit_weights(table.states[table.taught, choice.layer], table.refused[table.taught], choice.l2)


def _compute_loss(table: LabeledStates, left_out: Tensor, choice: HeadChoice) -> float:
    """Return the summed log loss on the left-out rows of `table.taught`."""
    evaluated = left_out & table.taught
    logits = compute_logits(fit_head(table.at(~left_out), choice), table.states[evaluated, choice.layer])
    return binary_cross_entropy_with_logits(logits, table.refused[evaluated].double(), reduction="sum").item()

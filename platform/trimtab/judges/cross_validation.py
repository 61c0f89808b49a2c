"""Cross-validation of the classifier head: figures on answers that it was not fitted on, nor chosen by.

Rows that share a prompt or an answer stay in one fold: labelled sets hold one answer under several prompts, and stock refusals
many times. Layer and penalty are chosen inside the training folds only (nested).
"""

import re
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

FOLDS, INNER = 5, 3
PENALTIES = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class LabeledStates:
    """Rows: `states` [n, layers, d], whether each was `refused` [n], whether a head may be fitted on it (`taught` [n]; other
    rows are only judged), and its group: these are not parted."""

    states: Tensor
    refused: Tensor
    taught: Tensor
    groups: Sequence[int]

    def at(self, wanted: Tensor) -> "LabeledStates":
        """Only the rows where `wanted` [n] is true."""
        groups = [g for g, w in zip(self.groups, wanted.tolist(), strict=True) if w]
        return LabeledStates(self.states[wanted], self.refused[wanted], self.taught[wanted], groups)


@dataclass(frozen=True)
class HeadChoice:
    """A layer, as an index into the table's layers, and a penalty."""

    layer: int
    l2: float


def group_rows(rows: Sequence[LabeledAnswer]) -> list[int]:
    """A number for each row; rows that are joined by equal prompts or answers, also over others, have the same."""
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for text in (f"prompt {_plain(row.prompt)}", f"answer {_plain(row.answer)}"):
            parents[root(i)] = root(first.setdefault(text, i))
    return [root(i) for i in range(len(rows))]


def assign_folds(table: LabeledStates, count: int) -> Tensor:
    """The fold [n] of each row, 0 to `count` - 1; whole groups, dealt out in a fixed order at random.

    Raises UsageError where there are not groups enough."""
    order = sorted(set(table.groups), key=lambda g: (hash_to_fraction(str(g), 0), g))
    if len(order) < count:
        raise UsageError(f"{len(order)} groups of labelled answers with different prompts are too few; give at least {count}")
    fold = {group: i % count for i, group in enumerate(order)}
    return torch.tensor([fold[g] for g in table.groups])


def choose_head(table: LabeledStates, count: int = INNER) -> HeadChoice:
    """The layer and penalty with the lowest log-loss on rows left out, by cross-validation within the table."""
    fold = assign_folds(table, count)
    best, least = HeadChoice(0, PENALTIES[-1]), float("inf")
    for layer in range(table.states.shape[1]):
        for l2 in PENALTIES:
            loss = sum(_loss(table, fold == i, HeadChoice(layer, l2)) for i in range(count))
            if loss < least:
                best, least = HeadChoice(layer, l2), loss
    return best


def predict_out_of_fold(table: LabeledStates, tell: Progress | None = None) -> Tensor:
    """Log-odds of a refusal [n] for every row, by heads that were fitted, and chosen, without its fold."""
    fold = assign_folds(table, FOLDS)
    found = torch.zeros(len(table.groups), dtype=torch.float64)
    for i in range(FOLDS):
        left_out = fold == i
        rest = table.at(~left_out)
        choice = choose_head(rest)
        found[left_out] = compute_logits(fit_head(rest, choice), table.states[left_out, choice.layer])
        if tell:
            tell(i + 1, FOLDS + 1)
    return found


def fit_head(table: LabeledStates, choice: HeadChoice) -> Tensor:
    """Weights and bias [d + 1] of a head fitted on the rows that may teach."""
    return fit_weights(table.states[table.taught, choice.layer], table.refused[table.taught], choice.l2)


def _loss(table: LabeledStates, left_out: Tensor, choice: HeadChoice) -> float:
    """Summed log-loss on the rows that were left out and may teach."""
    judged = left_out & table.taught
    odds = compute_logits(fit_head(table.at(~left_out), choice), table.states[judged, choice.layer])
    return binary_cross_entropy_with_logits(odds, table.refused[judged].double(), reduction="sum").item()


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()

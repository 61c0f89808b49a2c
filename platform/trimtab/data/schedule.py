"""Which rows a step sees: a function of seed and step alone, so that a resumed run sees what it would have seen."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from trimtab.types import LABELS


def select_batch(labels: Sequence[str], mix: Mapping[str, float], size: int, step: int, seed: int) -> list[int]:
    """Indices of the rows in the batch of `step` (from 0).

    `mix` gives each class its share of every batch; classes without rows give theirs up. Each class goes through its rows in
    a new random order each time round.
    """
    present = [label for label in LABELS if label in labels and mix.get(label, 0) > 0]
    counts = _count_per_class({label: mix[label] for label in present}, size)
    chosen: list[int] = []
    for label in present:
        mine = [i for i, other in enumerate(labels) if other == label]
        first = step * counts[label]
        for position in range(first, first + counts[label]):
            epoch, at = divmod(position, len(mine))
            chosen.append(mine[_shuffle_order(len(mine), seed, LABELS.index(label), epoch)[at]])
    return chosen


def _count_per_class(mix: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers in the proportions of `mix` that add up to `size` (largest remainders)."""
    total = sum(mix.values())
    exact = {label: size * part / total for label, part in mix.items()}
    counts = {label: int(value) for label, value in exact.items()}
    by_remainder = sorted(exact, key=lambda label: counts[label] - exact[label])
    for label in by_remainder[: size - sum(counts.values())]:
        counts[label] += 1
    return counts


@lru_cache(maxsize=16)
def _shuffle_order(size: int, seed: int, salt: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 101 + salt)
    return torch.randperm(size, generator=generator).tolist()

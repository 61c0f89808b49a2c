"""Deterministic schedule of training batches.

A batch depends only on the seed and the step, so a resumed run trains on the same batches as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from trimtab.types import LABELS


def select_batch(labels: Sequence[str], mix: Mapping[str, float], size: int, step: int, seed: int) -> list[int]:
    """Return the indices of the rows in the batch of one step.

    Each class passes through its rows in a new random order in every epoch.

    Args:
        labels: class of each row.
        mix: weight of each class in every batch. The shares of classes without rows go to the other classes.
        size: batch size in rows.
        step: training step, from 0.
        seed: seed of the row orders.
    """
    present = [label for label in LABELS if label in labels and mix.get(label, 0) > 0]
    counts = _count_per_class({label: mix[label] for label in present}, size)
    chosen: list[int] = []
    for label in present:
        rows = [i for i, other in enumerate(labels) if other == label]
        first = step * counts[label]
        for position in range(first, first + counts[label]):
            epoch, offset = divmod(position, len(rows))
            chosen.append(rows[_shuffle_order(len(rows), seed, LABELS.index(label), epoch)[offset]])
    return chosen


def _count_per_class(mix: Mapping[str, float], size: int) -> dict[str, int]:
    """Split `size` into integer counts in the proportions of `mix` by the largest-remainder method."""
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

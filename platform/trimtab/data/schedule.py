"""Deterministic schedule of training batches.

A batch depends only on the seed and the step, so a resumed run trains on the same batches as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from trimtab.types import LABELS


def split_by_correction(
    rows: Sequence[tuple[str, bool]], proportions: Mapping[str, float], fraction: float
) -> tuple[list[str], dict[str, float]]:
    """Split each class into rows that correct the model and rows that it answers as wanted.

    Rows of the first kind teach; those of the second kind prevent drift. A class with rows of one kind only is not split.

    Args:
        rows: class of each row, and whether its target differs in kind from the frozen model's own answer.
        proportions: weight of each class in every batch.
        fraction: share of the first kind within a class.

    Returns:
        Stratum of each row, and the weight of each stratum.
    """
    strata = [f"{label}, corrected" if corrected else label for label, corrected in rows]
    weights: dict[str, float] = {}
    for label in (label for label in LABELS if label in proportions):
        shares = {label: 1 - fraction, f"{label}, corrected": fraction}
        present = {stratum: share for stratum, share in shares.items() if stratum in strata}
        weights |= {stratum: proportions[label] * (share if len(present) == 2 else 1.0) for stratum, share in present.items()}
    return strata, weights


def select_batch(strata: Sequence[str], mix: Mapping[str, float], size: int, step: int, seed: int) -> list[int]:
    """Return the indices of the rows in the batch of one step.

    Each stratum passes through its rows in a new random order in every epoch.

    Args:
        strata: stratum of each row, such as its class.
        mix: weight of each stratum in every batch. The shares of strata without rows go to the others.
        size: batch size in rows.
        step: training step, from 0.
        seed: seed of the row orders.
    """
    present = [stratum for stratum in mix if stratum in strata and mix[stratum] > 0]
    counts = _count_per_stratum({stratum: mix[stratum] for stratum in present}, size)
    chosen: list[int] = []
    for number, stratum in enumerate(present):
        rows = [i for i, other in enumerate(strata) if other == stratum]
        first = step * counts[stratum]
        for position in range(first, first + counts[stratum]):
            epoch, offset = divmod(position, len(rows))
            chosen.append(rows[_shuffle_order(len(rows), seed, number, epoch)[offset]])
    return chosen


def _count_per_stratum(mix: Mapping[str, float], size: int) -> dict[str, int]:
    """Split `size` into integer counts in the proportions of `mix` by the largest-remainder method."""
    total = sum(mix.values())
    exact = {stratum: size * part / total for stratum, part in mix.items()}
    counts = {stratum: int(value) for stratum, value in exact.items()}
    by_remainder = sorted(exact, key=lambda stratum: counts[stratum] - exact[stratum])
    for stratum in by_remainder[: size - sum(counts.values())]:
        counts[stratum] += 1
    return counts


@lru_cache(maxsize=16)
def _shuffle_order(size: int, seed: int, salt: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 101 + salt)
    return torch.randperm(size, generator=generator).tolist()

"""Several data sets of signals as one, and the rows of live traffic that no detector is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.detection.live_labels import is_reserved
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel
from trimtab.util.identifiers import compute_key
from trimtab.util.remote_paths import open_folder


def read_datasets(folders: Sequence[str], base: BaseModel) -> dict[str, SignalDataset]:
    """Read data sets by folder; see `read_dataset`."""
    return {folder: read_dataset(open_folder(folder), base) for folder in folders}


def merge_datasets(sets: Mapping[str, SignalDataset], repeats: Sequence[int] = ()) -> SignalDataset:
    """Merge data sets at the layers that all of them have.

    A row that several sets have is used once, as in the first of them. Signals of unfinished answers remain if all sets have
    them.

    Args:
        sets: data sets by folder, at least one.
        repeats: number of times that the rows of each set count in training; by default once.

    Returns:
        The merged data set. Its identity is that of the first set, with the common layers.

    Raises:
        UsageError: if the sets differ in subject or prefix, or have no common layer.
    """
    layers = find_common_layers(sets)
    repeats = repeats or [1] * len(sets)
    counted = [replace(data, repeats=data.repeats * count) for data, count in zip(sets.values(), repeats, strict=True)]
    if len(counted) == 1:
        return counted[0]
    selected = [_select_layers(data, layers) for data in _drop_repeated_rows(counted)]
    columns: dict[str, Any] = {}
    for name, column in vars(selected[0]).items():
        parts = [getattr(data, name) for data in selected]
        if isinstance(column, Tensor):
            columns[name] = torch.cat(parts)
        elif isinstance(column, list):
            columns[name] = [entry for part in parts for entry in part]
    if not all(data.unfinished for data in selected):
        columns["unfinished"] = []
    digest = compute_key(" ".join([*(data.digest for data in sets.values()), *map(str, repeats)]).encode(), 16)
    return replace(selected[0], digest=digest, **columns)


def find_common_layers(sets: Mapping[str, SignalDataset]) -> list[int]:
    """Return the layers that all data sets have, in the order of the first one.

    Raises:
        UsageError: if the sets differ in subject or prefix, or have no common layer.
    """
    (first_name, first), *others = sets.items()
    for name, data in others:
        for field in ("fingerprint", "subject", "prefix_digest"):
            expected, found = getattr(first.meta, field), getattr(data.meta, field)
            if expected != found:
                reason = f"{name} has {field} {found}, {first_name} has {expected}"
                raise UsageError(f"signals cannot be merged: {reason}. Train one detector for each")
    layers = [layer for layer in first.meta.layers if all(layer in data.meta.layers for data in sets.values())]
    if not layers:
        raise UsageError(f"signals cannot be merged: {', '.join(sets)} have no common layer. Collect the same layers")
    return layers


def count_trusted_labels(data: SignalDataset) -> int:
    """Return the number of stored answers with a label of a rater that the operator trusts."""
    return int((data.is_live & data.has_trusted_label).sum())


def find_reserved_rows(data: SignalDataset, fraction: float) -> Tensor:
    """Return which rows [N] are reserved for calibration and gates: a fixed random share of the requests of live traffic.

    Rows of collected data sets are never reserved.

    Args:
        data: data set of N rows.
        fraction: reserved share of the requests. A smaller share is a part of a larger one.
    """
    return data.is_live & torch.tensor([is_reserved(group, fraction) for group in data.groups], dtype=torch.bool)


def _drop_repeated_rows(sets: Sequence[SignalDataset]) -> list[SignalDataset]:
    merged: set[str] = set()
    result: list[SignalDataset] = []
    for data in sets:
        result.append(data.select_rows(torch.tensor([key not in merged for key in data.keys])))
        merged |= set(data.keys)
    return result


def _select_layers(data: SignalDataset, layers: Sequence[int]) -> SignalDataset:
    indices = [data.meta.layers.index(layer) for layer in layers]
    return replace(
        data,
        meta=replace(data.meta, layers=tuple(layers)),
        psi=data.psi[:, indices],
        windows=[None if window is None else window[:, indices] for window in data.windows],
        unfinished=[states[:, indices] for states in data.unfinished],
        samples=[tuple(replace(s, state=s.state[indices]) for s in samples) for samples in data.samples],
    )

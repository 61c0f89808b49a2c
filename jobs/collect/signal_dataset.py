"""A data set of answers with their signals: a folder of Parquet parts and `dataset.json`, which says what they are of. The
folder may be on this machine or on any file system that fsspec knows.

Parts are written whole or not at all, so that a job that is stopped at any time leaves a data set that can be gone on with.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]
import torch
from pyarrow import ArrowInvalid  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from trimtab.errors import ArtifactError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.util.atomic_files import write_atomic
from trimtab.util.remote_paths import Folder, wrap_storage_errors

VERSION = 3
META = "dataset.json"
# Where a part says what it is of.
OF = b"trimtab"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("question", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),
        ("answer", pa.string()),
        ("truthful", pa.bool_()),
        ("why", pa.string()),
        ("tokens", pa.int32()),
        ("whole", pa.bool_()),
        ("psi", pa.list_(pa.float32())),
        ("history", pa.list_(pa.float32())),
        # Null where they were not asked for.
        ("samples", pa.list_(pa.struct([("text", pa.string()), ("tokens", pa.int32()), ("logp", pa.float32())]))),
        ("states", pa.list_(pa.float16())),
        ("p_true", pa.float32()),
    ]
)


@dataclass(frozen=True)
class DatasetMetadata:
    """What a data set is of: `base` and `fingerprint` of the model, `layers` that psi has, `width` d, `precision`, the digest
    of the `prefix` that the answers were written under, and `asked`, all else that an answer depends on."""

    base: str
    fingerprint: str
    layers: tuple[int, ...]
    width: int
    precision: str
    prefix: str | None
    asked: str
    version: int = VERSION


@dataclass(frozen=True)
class SampledAnswer:
    """One more answer to a question, drawn: its `text`, its number of `tokens`, their mean `logp` in nats, and its last
    `state` [L, d], float16."""

    text: str
    tokens: int
    logp: float
    state: Tensor


@dataclass(frozen=True)
class SignalDataset:
    """N answers. `psi` [N, L, 3d], `traces` N times [m, 3] (log-prob, entropy, margin of each token), `truthful` [N] (1, 0 or
    NaN); `samples` of each question, and `p_true`, the probability with which the model calls each answer true, None where
    they were not asked for; the rest as in the files, where answers of one group belong on one side of a split, and one that is
    not `whole` was cut off. `digest` names these rows."""

    meta: DatasetMetadata
    keys: list[str]
    questions: list[str]
    sources: list[str]
    groups: list[str]
    answers: list[str]
    whole: list[bool]
    psi: Tensor
    traces: list[Tensor]
    truthful: Tensor
    samples: list[tuple[SampledAnswer, ...]]
    p_true: list[float | None]
    digest: str


def begin_dataset(folder: Folder, meta: DatasetMetadata) -> set[str]:
    """Make the folder, or find the keys that it holds already. Raises UsageError for a data set of something else,
    ArtifactError where its file system does not answer."""
    with wrap_storage_errors(folder):
        path = folder / META
        if not path.exists():
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
            _write(path, (json.dumps(asdict(meta), indent=2) + "\n").encode())
            return set()
        there = _meta(folder)
        if different := [name for name, value in asdict(meta).items() if asdict(there)[name] != value]:
            raise UsageError(f"{folder} was collected with another {different[0]}: give another --out, or the same settings")
        return {key for part in _parts(folder) for key in _table(part, meta, ["key"])["key"].to_pylist()}


def append_part(folder: Folder, meta: DatasetMetadata, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as one more part of a data set that has begun."""
    written = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({OF: _of(meta)})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), written, compression="zstd")
    with wrap_storage_errors(folder):
        _write(folder / f"part-{uuid4().hex}.parquet", written.getvalue().to_pybytes())


def sample_columns(samples: Sequence[SampledAnswer]) -> dict[str, Any]:
    """The columns of a row's samples, which `append` takes; nulls where there are none."""
    if not samples:
        return {"samples": None, "states": None}
    return {
        "samples": [{"text": s.text, "tokens": s.tokens, "logp": s.logp} for s in samples],
        "states": torch.stack([s.state for s in samples]).flatten().numpy(),
    }


def read_dataset(folder: Folder, base: BaseModel | None = None) -> SignalDataset:
    """Read a data set whole, in the order of its keys.

    Raises ArtifactError where it is missing, damaged, empty, out of reach, or of another base model than `base`.
    """
    with wrap_storage_errors(folder):
        meta = _meta(folder)
        tables = [_table(part, meta) for part in _parts(folder)]
    if base is not None and meta.fingerprint != base.fingerprint:
        theirs, ours = f"{meta.base} ({meta.fingerprint})", f"{base.name} ({base.fingerprint})"
        raise ArtifactError(f"{folder} holds signals of {theirs}, not of {ours}: collect them with this model")
    if not tables:
        raise ArtifactError(f"{folder} holds no answers yet; `trimtab collect` fills it")
    table = _once(pa.concat_tables(tables).sort_by("key"))
    psi = np.stack(table["psi"].to_numpy()).astype(np.float32)
    truth = [float("nan") if value is None else float(value) for value in table["truthful"].to_pylist()]
    drawn, p_true = table["samples"].to_pylist(), table["p_true"].to_pylist()
    said = json.dumps([table["key"].to_pylist(), truth, drawn, p_true])
    digest = hashlib.sha256(psi.tobytes() + said.encode()).hexdigest()[:16]
    return SignalDataset(
        meta,
        table["key"].to_pylist(),
        table["question"].to_pylist(),
        table["source"].to_pylist(),
        table["group"].to_pylist(),
        table["answer"].to_pylist(),
        table["whole"].to_pylist(),
        torch.from_numpy(psi).view(len(psi), len(meta.layers), 3 * meta.width),
        [torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, 3) for values in table["history"].to_numpy()],
        torch.tensor(truth),
        [_samples(*both, meta) for both in zip(drawn, table["states"].to_numpy(), strict=True)],
        p_true,
        digest,
    )


def _samples(drawn: list[dict[str, Any]] | None, states: Any, meta: DatasetMetadata) -> tuple[SampledAnswer, ...]:
    if not drawn:
        return ()
    each = torch.from_numpy(np.array(states, dtype=np.float16)).view(len(drawn), len(meta.layers), meta.width)
    return tuple(SampledAnswer(state=state, **fields) for fields, state in zip(drawn, each, strict=True))


def _meta(folder: Folder) -> DatasetMetadata:
    path = folder / META
    if not path.exists():
        raise ArtifactError(f"{folder} is no data set of signals: it has no {META}; `trimtab collect` makes one")
    try:
        raw = json.loads(path.read_text())
        meta = DatasetMetadata(**raw)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not what `trimtab collect` writes") from error
    if meta.version != VERSION:
        raise ArtifactError(f"{path} is of version {meta.version}; this trimtab reads {VERSION}")
    return replace(meta, layers=tuple(meta.layers))


def _parts(folder: Folder) -> list[Folder]:
    return sorted(folder.glob("part-*.parquet"), key=str)


def _table(part: Folder, meta: DatasetMetadata, columns: list[str] | None = None) -> Any:
    try:
        with part.open("rb") as file:
            table = pq.read_table(file, columns=columns)
    except (ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{part} is not a whole Parquet file; remove it, and collect again what it held") from error
    if (table.schema.metadata or {}).get(OF) != _of(meta):
        raise ArtifactError(f"{part} holds no signals of the model, layers and prefix that {META} beside it names; remove it")
    return table


def _of(meta: DatasetMetadata) -> bytes:
    """What every part says that it is of."""
    return json.dumps([meta.version, meta.fingerprint, meta.layers, meta.width, meta.precision, meta.prefix]).encode()


def _once(table: Any) -> Any:
    """Rows of a table that is sorted by key, each key once: two jobs may have filled the same folder."""
    keys = table["key"].to_pylist()
    return table.take([at for at, key in enumerate(keys) if at == 0 or key != keys[at - 1]])


def _write(path: Folder, content: bytes) -> None:
    """A file that is there whole or not at all, as an object elsewhere is by itself."""
    if isinstance(path, Path):
        write_atomic(path, content)
    else:
        path.write_bytes(content)

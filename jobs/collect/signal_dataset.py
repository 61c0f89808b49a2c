"""Data set of answers or prompts with signals: a folder of Parquet parts and their metadata in `dataset.json`.

The folder is local or on any file system that fsspec supports. Parts are written atomically, so an interrupted job leaves a
data set that can be resumed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]
import torch
from pyarrow import ArrowInvalid  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from trimtab.detection.signals import build_window_states
from trimtab.errors import ArtifactError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.types import SUBJECTS, Subject
from trimtab.util.atomic_files import write_atomic
from trimtab.util.identifiers import compute_key
from trimtab.util.remote_paths import Folder, wrap_storage_errors

VERSION = 3
META = "dataset.json"
# Metadata key of a Parquet part under which it names its model, layers and prefix.
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
        # Null if they were not requested.
        ("samples", pa.list_(pa.struct([("text", pa.string()), ("tokens", pa.int32()), ("logp", pa.float32())]))),
        ("states", pa.list_(pa.float16())),
        ("p_true", pa.float32()),
        # Windows, labels and originals of prompts, and states of unfinished answers; absent from older parts.
        ("windows", pa.list_(pa.float32())),
        ("unfinished", pa.list_(pa.float16())),
        ("labels", pa.list_(pa.string())),
        ("original", pa.string()),
    ]
)


@dataclass(frozen=True)
class DatasetMetadata:
    """Identity of a data set.

    Attributes:
        base: name of the base model.
        fingerprint: base model fingerprint.
        layers: layers of psi.
        width: width d of the base model.
        dtype: data type of the model.
        prefix_digest: digest of the prefix that the answers were generated under; None without a prefix.
        settings: all other settings that an answer depends on, as JSON.
        version: version of the file format.
        subject: `answer` for answers to questions, `prompt` for prompts.
    """

    base: str
    fingerprint: str
    layers: tuple[int, ...]
    width: int
    dtype: str
    prefix_digest: str | None
    settings: str
    version: int = VERSION
    subject: Subject = "answer"


# Names in `dataset.json` by field. They are part of the format, and do not follow the fields.
STORED_NAMES = {
    "base": "base",
    "fingerprint": "fingerprint",
    "layers": "layers",
    "width": "width",
    "dtype": "precision",
    "prefix_digest": "prefix",
    "settings": "asked",
    "version": "version",
    "subject": "subject",
}


@dataclass(frozen=True)
class SampledAnswer:
    """Additional sampled answer to a question.

    Attributes:
        text: text of the answer.
        tokens: number of tokens.
        logp: mean log-probability of the tokens, in nats.
        state: last state [L, d], float16.
    """

    text: str
    tokens: int
    logp: float
    state: Tensor


@dataclass(frozen=True)
class SignalDataset:
    """N answers or prompts with labels and signals.

    Attributes:
        meta: identity of the data set.
        keys: unique keys of the rows.
        questions: questions, or prompts.
        sources: sources of the questions.
        groups: groups of the questions; a split keeps a group on one side.
        answers: texts of the answers, empty for prompts.
        finished: whether each answer is complete, that is, not truncated.
        psi: states of the answers or prompts [N, L, 3d].
        traces: N tensors [m, 3] with the log-probability, entropy and margin of each token; [0, 3] for prompts.
        truthful: labels [N]: 1 for a right answer or a benign prompt, 0 for a made-up answer or a harmful prompt, NaN if
            unlabeled.
        samples: sampled answers of each question; empty if they were not requested.
        p_true: probability with which the model calls each answer true; None if it was not requested.
        digest: digest of the rows.
        windows: mean states of the windows of each prompt [W, L, d]; None for prompts of one window, and for answers.
        unfinished: features of each unfinished answer at every `CHECK_INTERVAL` tokens [K, L, 3d], float16; empty if they were
            not collected.
        labels: labels of each prompt.
        originals: key of the prompt that each row is a rewrite of; None for other rows.
    """

    meta: DatasetMetadata
    keys: list[str]
    questions: list[str]
    sources: list[str]
    groups: list[str]
    answers: list[str]
    finished: list[bool]
    psi: Tensor
    traces: list[Tensor]
    truthful: Tensor
    samples: list[tuple[SampledAnswer, ...]]
    p_true: list[float | None]
    digest: str
    windows: list[Tensor | None]
    unfinished: list[Tensor]
    labels: list[tuple[str, ...]]
    originals: list[str | None]

    def list_labels(self) -> list[str]:
        """Return the names of all labels in alphabetical order."""
        return sorted({label for labels in self.labels for label in labels})

    def select_label(self, label: str) -> "SignalDataset":
        """Return the data set with the rows that have a label as positives, and all others as negatives."""
        return replace(self, truthful=torch.tensor([float(label not in labels) for labels in self.labels]))

    def build_windows(self) -> list[Tensor | None]:
        """Build the features [W, L, 3d] of the windows of each prompt; None for prompts of one window."""
        pairs = zip(self.psi, self.windows, strict=True)
        return [None if window is None else build_window_states(psi, window) for psi, window in pairs]


def begin_dataset(folder: Folder, meta: DatasetMetadata) -> set[str]:
    """Create the data set, or open an existing one.

    Returns:
        Keys of the existing rows.

    Raises:
        UsageError: if the folder holds a data set with another identity.
        ArtifactError: if the file system fails or the data set is damaged.
    """
    with wrap_storage_errors(folder):
        path = folder / META
        if not path.exists():
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
            _write(path, (json.dumps(metadata_as_json(meta), indent=2) + "\n").encode())
            return set()
        existing = _meta(folder)
        if different := [name for name, value in vars(meta).items() if vars(existing)[name] != value]:
            raise UsageError(f"{folder} was collected with different {different[0]}. Pass another --out, or the same settings")
        return {key for part in _parts(folder) for key in _table(part, meta, ["key"])["key"].to_pylist()}


def metadata_as_json(meta: DatasetMetadata) -> dict[str, Any]:
    """Return the content of `dataset.json`."""
    return {name: getattr(meta, field) for field, name in STORED_NAMES.items()}


def append_part(folder: Folder, meta: DatasetMetadata, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a new part of an existing data set."""
    buffer = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({OF: _of(meta)})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    with wrap_storage_errors(folder):
        _write(folder / f"part-{uuid4().hex}.parquet", buffer.getvalue().to_pybytes())


def sample_columns(samples: Sequence[SampledAnswer]) -> dict[str, Any]:
    """Return the sample columns of a row for `append_part`; nulls if there are no samples."""
    if not samples:
        return {"samples": None, "states": None}
    return {
        "samples": [{"text": s.text, "tokens": s.tokens, "logp": s.logp} for s in samples],
        "states": torch.stack([s.state for s in samples]).flatten().numpy(),
    }


def read_dataset(folder: Folder, base: BaseModel | None = None) -> SignalDataset:
    """Read a complete data set, ordered by key.

    Args:
        folder: folder of the data set.
        base: expected base model; None to skip the check.

    Raises:
        ArtifactError: if the data set is missing, damaged, empty, unreachable, or of another base model than `base`.
    """
    with wrap_storage_errors(folder):
        meta = _meta(folder)
        tables = [_table(part, meta) for part in _parts(folder)]
    if base is not None and meta.fingerprint != base.fingerprint:
        actual, expected = f"{meta.base} ({meta.fingerprint})", f"{base.name} ({base.fingerprint})"
        raise ArtifactError(f"{folder} holds signals of {actual}, not of {expected}. Collect signals with {base.name}")
    if not tables:
        raise ArtifactError(f"{folder} holds no signals. Run `trimtab collect` to fill it")
    table = _drop_duplicates(pa.concat_tables(tables, promote_options="default").sort_by("key"))
    psi = np.stack(table["psi"].to_numpy()).astype(np.float32)
    truth = [float("nan") if value is None else float(value) for value in table["truthful"].to_pylist()]
    samples, p_true = table["samples"].to_pylist(), table["p_true"].to_pylist()
    rest = json.dumps([table["key"].to_pylist(), truth, samples, p_true])
    digest = compute_key(psi.tobytes() + rest.encode(), 16)
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
        [_samples(*pair, meta) for pair in zip(samples, table["states"].to_numpy(), strict=True)],
        p_true,
        digest,
        [_reshape(values, (-1, len(meta.layers), meta.width)) for values in _column(table, "windows")],
        _list_unfinished(table, meta),
        [tuple(labels if labels is not None else ()) for labels in _column(table, "labels")],
        table["original"].to_pylist() if "original" in table.column_names else [None] * len(table),
    )


def _list_unfinished(table: Any, meta: DatasetMetadata) -> list[Tensor]:
    if not json.loads(meta.settings or "{}").get("unfinished"):
        return []
    states = [_reshape(values, (-1, len(meta.layers), 3 * meta.width)) for values in _column(table, "unfinished")]
    nothing = torch.empty(0, len(meta.layers), 3 * meta.width, dtype=torch.float16)
    return [nothing if entry is None else entry for entry in states]


def _column(table: Any, name: str) -> list[Any]:
    return table[name].to_numpy() if name in table.column_names else [None] * len(table)


def _reshape(values: Any, shape: tuple[int, ...]) -> Tensor | None:
    return None if values is None else torch.from_numpy(np.array(values)).view(shape)


def _samples(samples: list[dict[str, Any]] | None, states: Any, meta: DatasetMetadata) -> tuple[SampledAnswer, ...]:
    if not samples:
        return ()
    stacked = torch.from_numpy(np.array(states, dtype=np.float16)).view(len(samples), len(meta.layers), meta.width)
    return tuple(SampledAnswer(state=state, **fields) for fields, state in zip(samples, stacked, strict=True))


def _meta(folder: Folder) -> DatasetMetadata:
    path = folder / META
    if not path.exists():
        raise ArtifactError(f"{folder} is no data set of signals: it has no {META}. Run `trimtab collect` to create one")
    try:
        # Data sets of release 0.1.0 have no subject.
        raw: dict[str, Any] = {"subject": "answer"} | json.loads(path.read_text())
        values: dict[str, Any] = {field: raw[name] for field, name in STORED_NAMES.items()}
        values["layers"] = tuple(values["layers"])
        meta = DatasetMetadata(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is not the metadata of a signal data set") from error
    if meta.subject not in SUBJECTS:
        raise ArtifactError(f"{path} has subject {meta.subject!r}; this trimtab reads {', '.join(SUBJECTS)}")
    if meta.version != VERSION:
        raise ArtifactError(f"{path} is of version {meta.version}; this trimtab reads {VERSION}")
    return meta


def _parts(folder: Folder) -> list[Folder]:
    return sorted(folder.glob("part-*.parquet"), key=str)


def _table(part: Folder, meta: DatasetMetadata, columns: list[str] | None = None) -> Any:
    try:
        with part.open("rb") as file:
            table = pq.read_table(file, columns=columns)
    except (ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{part} is not a whole Parquet file. Remove it and rerun `trimtab collect`") from error
    if (table.schema.metadata or {}).get(OF) != _of(meta):
        raise ArtifactError(f"{part} does not match the model, layers and prefix in {META} of the same folder. Remove it")
    return table


def _of(meta: DatasetMetadata) -> bytes:
    """Encode the identity that every part carries."""
    return json.dumps([meta.version, meta.fingerprint, meta.layers, meta.width, meta.dtype, meta.prefix_digest]).encode()


def _drop_duplicates(table: Any) -> Any:
    """Drop repeated keys of a table sorted by key; two jobs may have written to the same folder."""
    keys = table["key"].to_pylist()
    return table.take([index for index, key in enumerate(keys) if index == 0 or key != keys[index - 1]])


def _write(path: Folder, content: bytes) -> None:
    """Write a file atomically; writes to object stores are atomic by themselves."""
    if isinstance(path, Path):
        write_atomic(path, content)
    else:
        path.write_bytes(content)

"""Files of a data set of signals: Parquet parts, and their metadata in `dataset.json`.

The folder is local or on any file system that fsspec supports. Parts are written atomically, so an interrupted job leaves a
data set that can be resumed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]
from pyarrow import ArrowInvalid  # pyright: ignore[reportMissingTypeStubs]

from trimtab.errors import ArtifactError, UsageError
from trimtab.types import SUBJECTS, Subject
from trimtab.util.atomic_files import write_atomic
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
        # Time at which a server stored an answer (seconds since 1970); absent from collected data.
        ("at", pa.float64()),
        # Model, detector and risk of an answer that a server stored.
        ("model", pa.string()),
        ("detector", pa.string()),
        ("risk", pa.float32()),
    ]
)
# Columns that a server stores in half precision.
HALVED = ("psi", "history")


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
        existing = read_metadata(folder)
        if different := [name for name, value in vars(meta).items() if vars(existing)[name] != value]:
            raise UsageError(f"{folder} was collected with different {different[0]}. Pass another --out, or the same settings")
        return {key for part in list_parts(folder) for key in read_part(part, meta, ["key"])["key"].to_pylist()}


def metadata_as_json(meta: DatasetMetadata) -> dict[str, Any]:
    """Return the content of `dataset.json`."""
    return {name: getattr(meta, field) for field, name in STORED_NAMES.items()}


def append_part(folder: Folder, meta: DatasetMetadata, rows: Sequence[dict[str, Any]], *, halved: bool = False) -> int:
    """Write rows as a new part of an existing data set.

    Args:
        folder: folder of the data set.
        meta: identity of the data set.
        rows: rows by column name; absent columns are null.
        halved: store the signals in half precision; they must be float16 arrays.

    Returns:
        Size of the part in bytes.
    """
    buffer = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({OF: _of(meta)})
    for name in HALVED if halved else ():
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.list_(pa.float16())))
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    content = buffer.getvalue().to_pybytes()
    with wrap_storage_errors(folder):
        _write(folder / f"part-{uuid4().hex}.parquet", content)
    return len(content)


def read_metadata(folder: Folder) -> DatasetMetadata:
    """Read the identity of a data set.

    Raises:
        ArtifactError: if the folder has no data set, or its metadata are invalid or of another version.
    """
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


def list_parts(folder: Folder) -> list[Folder]:
    """Return the Parquet parts of a data set."""
    return sorted(folder.glob("part-*.parquet"), key=str)


def read_part(part: Folder, meta: DatasetMetadata, columns: list[str] | None = None) -> Any:
    """Read a part as a table, with signals in single precision.

    Args:
        part: Parquet file.
        meta: identity of its data set.
        columns: columns to read; None for all.

    Raises:
        ArtifactError: if the file is damaged, or of another data set.
    """
    try:
        # Threads of Arrow that read from a Python file can abort or block the process when it exits (apache/arrow#50482).
        content = pa.BufferReader(part.read_bytes())
        table = pq.ParquetFile(content).read(columns=columns, use_threads=False)
    except (ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{part} is not a whole Parquet file. Remove it and rerun `trimtab collect`") from error
    if (table.schema.metadata or {}).get(OF) != _of(meta):
        raise ArtifactError(f"{part} does not match the model, layers and prefix in {META} of the same folder. Remove it")
    for name in HALVED:
        if name in table.column_names and table.schema.field(name).type == pa.list_(pa.float16()):
            column = table[name].cast(pa.list_(pa.float32()))
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def read_rows(folder: Folder, columns: list[str]) -> list[dict[str, Any]]:
    """Read some columns of all rows of a data set, without the signals."""
    meta = read_metadata(folder)
    return [row for part in list_parts(folder) for row in read_part(part, meta, columns).to_pylist()]


def _of(meta: DatasetMetadata) -> bytes:
    """Encode the identity that every part carries."""
    return json.dumps([meta.version, meta.fingerprint, meta.layers, meta.width, meta.dtype, meta.prefix_digest]).encode()


def _write(path: Folder, content: bytes) -> None:
    """Write a file atomically; writes to object stores are atomic by themselves."""
    if isinstance(path, Path):
        write_atomic(path, content)
    else:
        path.write_bytes(content)

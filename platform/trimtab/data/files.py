"""Readers of rows: JSONL, JSON, CSV and Parquet files, downloaded assets, and Hugging Face datasets.

Rows come with clean values: an empty CSV cell, a null and NaN are None, and text can be encoded as UTF-8.
"""

import ast
import csv
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.assets.download import fetch_asset
from trimtab.errors import UsageError

Row = Mapping[str, Any]
# Files of Windows programs begin with a byte-order mark.
ENCODING = "utf-8-sig"


def read_rows(source: str) -> list[Row]:
    """Read the rows of one source.

    Args:
        source: a file, a downloaded asset `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.

    Raises:
        UsageError: if the source is missing, unreadable or empty.
        NotFoundError: if `trimtab:NAME` is unknown.
    """
    name = source.removeprefix("trimtab:")
    path = Path(source).expanduser() if name == source else fetch_asset(name)
    is_file = path.exists() or path.suffix in READERS
    rows = read_file(path) if is_file else _clean_rows(_read_hub(source), source)
    if not rows:
        raise UsageError(f"{source} has no rows")
    return rows


def read_file(path: Path) -> list[Row]:
    """Read the rows of a file (.jsonl, .json, .csv, .parquet).

    Raises:
        UsageError: if the file is missing, unreadable or of an unsupported type, or a row is not an object.
    """
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UsageError(f"{path}: unsupported file type. Use {', '.join(READERS)}")
    try:
        rows = reader(path)
    except (UnicodeDecodeError, ValueError, OSError, RecursionError, csv.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from error
    return _clean_rows(rows, str(path))


def rename_columns(fields: Sequence[str], columns: Mapping[str, str] | None, rows: Sequence[Row] = ()) -> dict[str, str]:
    """Return the column name of each field.

    A column matches a field if their names are equal without surrounding spaces and without case. An exact match comes first.

    Args:
        fields: names of the fields, which are the default column names.
        columns: column names that differ from the field names.
        rows: rows, whose columns are searched; without rows, names are returned as they are.

    Raises:
        UsageError: if `columns` renames an unknown field.
    """
    if unknown := set(columns or {}) - set(fields):
        raise UsageError(f"columns may rename {', '.join(fields)}, not {', '.join(sorted(unknown))}")
    wanted = {field: field for field in fields} | dict(columns or {})
    present = {name: None for row in rows for name in row}
    normalized = {normalize_name(name): name for name in reversed(present)}
    return {field: name if name in present else normalized.get(normalize_name(name), name) for field, name in wanted.items()}


def normalize_name(name: object) -> str:
    """Return the form in which names of columns and classes are compared: without surrounding spaces and without case."""
    return str(name).strip().casefold()


def parse_list(text: str, location: str) -> list[Any] | None:
    """Parse a list that a CSV cell holds as text, in JSON or as Python prints it.

    Args:
        text: text of the cell.
        location: file and row, for the message.

    Returns:
        The list; None if the text does not look like a list.

    Raises:
        UsageError: if the text looks like a list but is none.
    """
    stripped = text.strip()
    # A word in brackets, such as [sic], is text.
    if not re.fullmatch(r"\[\s*\]|\[.*[,'\"].*\]", stripped, re.DOTALL):
        return None
    try:
        values = json.loads(stripped)
    except ValueError:
        values = _parse_python_list(stripped)
    if not isinstance(values, list):
        raise UsageError(
            f"{location}: {stripped[:60]!r} looks like a list, but is neither JSON nor Python. Write a list as JSON"
        )
    return values


def _parse_python_list(text: str) -> list[Any] | None:
    try:
        values = ast.literal_eval(text)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        strings = sum(token.type == tokenize.STRING for token in tokens)
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    # NumPy prints lists without commas, and Python joins adjacent strings into one.
    joined = isinstance(values, list) and strings > sum(isinstance(value, str) for value in values)
    return None if joined and not any(isinstance(value, list | dict | tuple) for value in values) else values


def _clean_rows(rows: Iterable[Any], source: str) -> list[Row]:
    """Check that rows are objects with text that UTF-8 can encode, and replace NaN by None."""
    cleaned: list[Row] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row:
            raise UsageError(f"{source}, row {number}: every row must be an object with named fields")
        cleaned.append({name: _clean_value(value, f"{source}, row {number}") for name, value in row.items()})
    return cleaned


def _clean_value(value: Any, location: str) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{location} contains half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is no text. Write the "
                "file again without cutting the character"
            ) from error
        return value
    if isinstance(value, list | tuple):
        return [_clean_value(entry, location) for entry in value]
    if isinstance(value, dict):
        return {key: _clean_value(entry, location) for key, entry in value.items()}
    # NaN, and pandas' missing values, are the only ones that differ from themselves.
    return None if value != value else value


def _read_json(path: Path) -> list[Any]:
    """Read a JSON list or JSON Lines, whatever the name of the file says."""
    text = path.read_text(encoding=ENCODING)
    if text.lstrip().startswith("["):
        # JSON Lines may also begin with a list, which is refused as a row.
        with suppress(ValueError):
            return json.loads(text)
    return _parse_lines(text)


def _parse_lines(text: str) -> list[Any]:
    rows: list[Any] = []
    # Not splitlines(): it also splits at line separators that JSON strings may contain unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    return rows


def _read_csv(path: Path) -> list[Row]:
    text = path.read_text(encoding=ENCODING)
    # Only lines before the header are comments: an answer may contain a line that starts with "#".
    while text.startswith("#"):
        text = text.partition("\n")[2]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, [])
    if doubled := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"the header has the column {doubled[0]!r} twice")
    rows: list[Row] = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"row {len(rows) + 1} has {len(cells)} cells, but the header has {len(header)}. Quote the text that contains "
                "commas"
            )
        # An empty cell is how CSV writes that there is no value.
        rows.append({name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=True)})
    return rows


def _read_parquet(path: Path) -> list[Any]:
    # Imported lazily: the core also runs with only torch, transformers and safetensors installed.
    return import_module("pyarrow.parquet").read_table(path).to_pylist()


def _read_hub(source: str) -> list[Any]:
    name, _, part = source.partition(":")
    owner, *rest = name.split("/")
    if len(rest) not in (1, 2) or not all((owner, *rest)):
        raise UsageError(f"there is no file {source}; a Hugging Face dataset is named org/name[/config][:split]")
    try:
        datasets = import_module("datasets")
        return list(datasets.load_dataset(f"{owner}/{rest[0]}", *rest[1:], split=part or "train"))
    except Exception as error:  # the hub client raises many error classes
        raise UsageError(f"the Hugging Face dataset {source} cannot be read ({type(error).__name__})") from error


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

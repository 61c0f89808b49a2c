"""Readers of rows and prompts: JSONL, JSON, CSV and Parquet files, Hugging Face datasets, `trimtab:NAME` sets."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.assets.catalog import load_catalog
from trimtab.assets.download import fetch_asset
from trimtab.data.prompt import Prompt
from trimtab.data.prompt_sets import SETS, read_prompt_set
from trimtab.errors import UsageError
from trimtab.types import LABELS, Label

Row = Mapping[str, Any]
FIELDS = ("prompt", "class", "target", "system", "group", "source", "messages")

SYNONYMS: dict[str, Label] = {
    **{label: label for label in LABELS},
    "unsafe": "harmful",
    "safe": "benign_hard",
    "benign": "benign_hard",
}


def read_prompts(source: str, label: Label | None = None, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read the prompts of one source.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        label: class of rows without one. A packaged set returns only the prompts on the same side (harmful or benign).
        columns: column names of the fields prompt, class, target, system, group, source and messages, if they differ from
            the field names.

    Returns:
        One prompt per row, in order.

    Raises:
        UsageError: if the file is missing, empty or unreadable, a column is missing, or a class is unknown. The message names
            the file and the remedy.
        NotFoundError: if `trimtab:NAME` is unknown.
    """
    name = source.removeprefix("trimtab:")
    if name != source and (name in SETS or name not in load_catalog()):
        return read_prompt_set(name, label)
    rows = read_rows(source)
    names = rename_columns(FIELDS, columns)
    return [_parse_prompt(row, number, source, label, names) for number, row in enumerate(rows, 1)]


def read_all_prompts(sources: Sequence[str], label: Label | None, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read the prompts of several sources, in order; see `read_prompts`."""
    return [prompt for source in sources for prompt in read_prompts(source, label, columns)]


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
    rows = read_file(path) if path.exists() or path.suffix in READERS else _read_hub(source)
    if not rows:
        raise UsageError(f"{source} has no rows")
    return rows


def rename_columns(fields: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return the column name of each field.

    Args:
        fields: names of the fields, which are the default column names.
        columns: column names that differ from the field names.

    Raises:
        UsageError: if `columns` renames an unknown field.
    """
    unknown = set(columns or {}) - set(fields)
    if unknown:
        raise UsageError(f"columns may rename {', '.join(fields)}, not {', '.join(sorted(unknown))}")
    return {field: field for field in fields} | dict(columns or {})


def _parse_prompt(row: Row, number: int, source: str, default: Label | None, names: Mapping[str, str]) -> Prompt:
    conversation = _parse_conversation(row[names["messages"]], f"{source}, row {number}") if row.get(names["messages"]) else {}
    history = conversation.pop("history", ())
    row = {**row, **{names[field]: value for field, value in conversation.items() if value is not None}}
    text = row.get(names["prompt"])
    if names["prompt"] not in row:
        raise UsageError(
            f"{source} has no column {names['prompt']!r}; it has {', '.join(map(str, row))}. Set --data.columns.prompt"
        )
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{source}, row {number}: the prompt is empty or not text")
    class_name = row.get(names["class"])
    label = SYNONYMS.get(str(class_name)) if class_name not in (None, "") else default
    if label is None:
        raise UsageError(f"{source}, row {number}: class {class_name!r} must be one of {', '.join(SYNONYMS)}")
    target, system = row.get(names["target"]), row.get(names["system"])
    return Prompt(
        prompt=text.strip(),
        label=label,
        source=str(row.get(names["source"]) or Path(source).stem),
        group=str(row.get(names["group"]) or text.strip().lower()),
        target=str(target) if target else None,
        system=str(system) if system else None,
        history=tuple(history),
    )


def _parse_conversation(messages: Any, location: str) -> dict[str, Any]:
    """Split chat messages into system, history, prompt and, if the assistant has the last turn, target."""
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UsageError(f"{location}: messages must be a list of objects with role and content, both text")
        turns.append((str(message["role"]), message["content"]))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    target = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise UsageError(f"{location}: messages must end with a user message, or with the assistant's answer to one")
    prompt = turns.pop()[1]
    return {"system": system, "history": turns, "prompt": prompt, "target": target}


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
    except (UnicodeDecodeError, ValueError, OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every row must be an object with named fields")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): it also splits at line separators that JSON strings may contain unescaped.
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    return rows


def _read_json(path: Path) -> list[Row]:
    rows = json.loads(path.read_text())
    if not isinstance(rows, list):
        raise ValueError("the file must hold a list")
    return rows


def _read_csv(path: Path) -> list[Row]:
    text = path.read_text()
    # Only lines before the header are comments: an answer may contain a line that starts with "#".
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def _read_parquet(path: Path) -> list[Row]:
    # Imported lazily: the core also runs with only torch, transformers and safetensors installed.
    return import_module("pyarrow.parquet").read_table(path).to_pylist()


def _read_hub(source: str) -> list[Row]:
    name, _, part = source.partition(":")
    owner, *rest = name.split("/")
    if len(rest) not in (1, 2) or not all((owner, *rest)):
        raise UsageError(f"there is no file {source}; a Hugging Face dataset is named org/name[/config][:split]")
    try:
        datasets = import_module("datasets")
        return list(datasets.load_dataset(f"{owner}/{rest[0]}", *rest[1:], split=part or "train"))
    except Exception as error:  # the hub client raises many error classes
        raise UsageError(f"the Hugging Face dataset {source} cannot be read ({type(error).__name__})") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

"""Read prompt files: JSONL, JSON, CSV, Parquet, a Hugging Face dataset, or a set of the catalogue by `trimtab:NAME`."""

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
    """Prompts of one source.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        label: the class of rows that carry none.
        columns: other names of the fields prompt, class, target, system, group, source and messages.

    Raises UsageError, naming the file and what to do: missing, empty or unreadable file, wrong column, unknown class.
    """
    name = source.removeprefix("trimtab:")
    if name != source and (name in SETS or name not in load_catalog()):
        return read_prompt_set(name, label)
    rows = read_rows(source)
    names = rename_columns(FIELDS, columns)
    return [_parse_prompt(row, number, source, label, names) for number, row in enumerate(rows, 1)]


def read_all_prompts(sources: Sequence[str], label: Label | None, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Prompts of several sources, in order."""
    return [prompt for source in sources for prompt in read_prompts(source, label, columns)]


def read_rows(source: str) -> list[Row]:
    """Rows of a file, of a file of the catalogue (`trimtab:NAME`), or of a Hugging Face dataset `org/name[/config][:split]`.

    Raises UsageError where there are none that can be read, NotFoundError for an unknown name.
    """
    name = source.removeprefix("trimtab:")
    path = Path(source).expanduser() if name == source else fetch_asset(name)
    rows = read_file(path) if path.exists() or path.suffix in READERS else _read_hub(source)
    if not rows:
        raise UsageError(f"{source} has no rows")
    return rows


def rename_columns(fields: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column of each field. Raises UsageError where `columns` names another field."""
    unknown = set(columns or {}) - set(fields)
    if unknown:
        raise UsageError(f"columns may rename {', '.join(fields)}; {', '.join(sorted(unknown))} is none of them")
    return {field: field for field in fields} | dict(columns or {})


def _parse_prompt(row: Row, number: int, source: str, default: Label | None, names: Mapping[str, str]) -> Prompt:
    said = _parse_conversation(row[names["messages"]], f"{source}, row {number}") if row.get(names["messages"]) else {}
    history = said.pop("history", ())
    row = {**row, **{names[field]: value for field, value in said.items() if value is not None}}
    text = row.get(names["prompt"])
    if names["prompt"] not in row:
        raise UsageError(
            f"{source} has no column {names['prompt']!r}; it has {', '.join(map(str, row))}: name yours with "
            f"--data.columns.prompt"
        )
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{source}, row {number}: the prompt is empty or not text")
    given = row.get(names["class"])
    label = SYNONYMS.get(str(given)) if given not in (None, "") else default
    if label is None:
        raise UsageError(f"{source}, row {number}: class {given!r} must be one of {', '.join(SYNONYMS)}")
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


def _parse_conversation(messages: Any, where: str) -> dict[str, Any]:
    """The fields that a list of chat messages holds: system, history, prompt, and target where the assistant has the end."""
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UsageError(f"{where}: messages must be a list of objects with role and content, both text")
        turns.append((str(message["role"]), message["content"]))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    target = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise UsageError(f"{where}: messages must end with the user's, or with the assistant's answer to it")
    prompt = turns.pop()[1]
    return {"system": system, "history": turns, "prompt": prompt, "target": target}


def read_file(path: Path) -> list[Row]:
    """Rows of a file with named fields. Raises UsageError: missing, unreadable, or of a kind that is not known."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UsageError(f"{path}: a file of rows ends in {', '.join(READERS)}")
    try:
        rows = reader(path)
    except (UnicodeDecodeError, ValueError, OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every row must be an object with named fields")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): JSON may hold other line ends as they are.
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
    # Comments stand before the header; later a "#" may open a line of an answer.
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def _read_parquet(path: Path) -> list[Row]:
    # Not on top: the core also runs where only torch, transformers and safetensors are installed.
    return import_module("pyarrow.parquet").read_table(path).to_pylist()


def _read_hub(source: str) -> list[Row]:
    name, _, part = source.partition(":")
    owner, *rest = name.split("/")
    if len(rest) not in (1, 2) or not all((owner, *rest)):
        raise UsageError(f"there is no file {source}; a Hugging Face dataset is named org/name[/config][:split]")
    try:
        datasets = import_module("datasets")
        return list(datasets.load_dataset(f"{owner}/{rest[0]}", *rest[1:], split=part or "train"))
    except Exception as error:  # the hub client raises many kinds; people need the one line
        raise UsageError(f"the hub's dataset {source} cannot be read ({type(error).__name__})") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

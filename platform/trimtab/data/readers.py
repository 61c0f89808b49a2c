"""Reader of prompts with classes: files, Hugging Face datasets, `trimtab:NAME` sets."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.assets.catalog import load_catalog
from trimtab.data.files import Row, normalize_name, parse_list, read_rows, rename_columns
from trimtab.data.prompt import Prompt
from trimtab.data.prompt_sets import SETS, read_prompt_set
from trimtab.errors import UsageError
from trimtab.types import LABELS, Label

log = logging.getLogger(__name__)

FIELDS = ("prompt", "class", "labels", "target", "system", "group", "source", "messages")

LABEL_NAME = re.compile(r"[A-Za-z0-9][\w/-]{0,63}", re.ASCII)
# Names of columns that usually hold a class.
LABEL_COLUMNS = {"label", "labels", "category", "harmful", "is_harmful", "safety", "toxic", "unsafe", "verdict"}
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
        columns: column names of the fields prompt, class, labels, target, system, group, source and messages, if they differ
            from the field names.

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
    names = rename_columns(FIELDS, columns, rows)
    if label is not None and (unused := _find_label_column(rows, names)):
        log.warning(
            "%s: column %r looks like a class but is not used; every row is %s. Set --data.columns.class to use it",
            source,
            unused,
            label,
        )
    return [_parse_prompt(row, number, source, label, names) for number, row in enumerate(rows, 1)]


def read_all_prompts(sources: Sequence[str], label: Label | None, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read the prompts of several sources, in order; see `read_prompts`."""
    return [prompt for source in sources for prompt in read_prompts(source, label, columns)]


def _find_label_column(rows: Sequence[Row], names: Mapping[str, str]) -> str | None:
    """Return a column that looks like the class of the rows although no field reads it; None if there is none."""
    if any(names["class"] in row for row in rows):
        return None
    columns = {name: None for row in rows for name in row if name not in names.values()}
    for name in columns:
        values = {normalize_name(row[name]) for row in rows if row.get(name) is not None}
        if normalize_name(name) in LABEL_COLUMNS or (values and values <= SYNONYMS.keys()):
            return name
    return None


def _parse_prompt(row: Row, number: int, source: str, default: Label | None, names: Mapping[str, str]) -> Prompt:
    location = f"{source}, row {number}"
    messages = row.get(names["messages"])
    conversation = {} if messages is None else _parse_conversation(messages, location)
    history = conversation.pop("history", ())
    row = {**row, **{names[field]: value for field, value in conversation.items() if value is not None}}
    text = row.get(names["prompt"])
    if names["prompt"] not in row:
        raise UsageError(
            f"{source} has no column {names['prompt']!r}; it has {', '.join(map(str, row))}. Set --data.columns.prompt"
        )
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{location}: the prompt is empty or not text")
    class_name = row.get(names["class"])
    labels = _parse_labels(row, names, location)
    label = default if class_name is None else SYNONYMS.get(normalize_name(class_name))
    if class_name is None and labels is not None:
        label = "harmful" if labels else "benign_hard"
    if label is None:
        raise UsageError(f"{location}: class {class_name!r} must be one of {', '.join(SYNONYMS)}")
    target, system, group, name = (row.get(names[field]) for field in ("target", "system", "group", "source"))
    return Prompt(
        prompt=text.strip(),
        label=label,
        # 0 and False are values: rows are often numbered from 0.
        source=Path(source).stem if name is None else str(name),
        group=text.strip().lower() if group is None else str(group),
        target=_as_optional_text(target),
        system=_as_optional_text(system),
        history=tuple(history),
        labels=labels or (),
    )


def _parse_labels(row: Row, names: Mapping[str, str], location: str) -> tuple[str, ...] | None:
    """Return the labels of a row: a list, or text separated by semicolons; None if the rows have no labels."""
    column = names["labels"]
    if column not in row or column == names["class"]:
        return None
    value: Any = row[column]
    if isinstance(value, str):
        value = parse_list(value, location) if value.strip().startswith("[") else value.split(";")
    listed = value if isinstance(value, list) else [] if value is None else [None]
    labels = [label.strip() for label in listed if isinstance(label, str)]
    if len(labels) < len(listed) or not all(LABEL_NAME.fullmatch(label) for label in labels if label):
        raise UsageError(f"{location}: labels must be names of letters, digits, '_', '-' and '/', such as [\"violence\"]")
    if classes := SYNONYMS.keys() & {normalize_name(label) for label in labels}:
        raise UsageError(f"{location}: label {min(classes)!r} is a class. Set --columns.class {column}")
    return tuple(dict.fromkeys(filter(None, labels)))


def _as_optional_text(value: Any) -> str | None:
    """Return a cell as text; None if it is absent or has no text."""
    return None if value is None or not str(value).strip() else str(value)


def _parse_conversation(messages: Any, location: str) -> dict[str, Any]:
    """Split chat messages into system, history, prompt and, if the assistant has the last turn, target."""
    if isinstance(messages, str):
        messages = parse_list(messages, location)
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UsageError(f"{location}: messages must be a list of objects with role and content, both text")
        turns.append((str(message["role"]), message["content"]))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    target = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise UsageError(f"{location}: messages must end with a user message, or with the assistant's answer to one")
    prompt = turns.pop()[1]
    return {"system": system, "history": turns, "prompt": prompt, "target": target}

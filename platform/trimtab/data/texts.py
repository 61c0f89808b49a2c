"""Reader of neutral texts, on which a model is scored by teacher forcing.

Each text is the assistant's answer to a prompt.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from trimtab.assets.catalog import load_catalog
from trimtab.data.files import Row, read_rows, rename_columns
from trimtab.data.prompt import Prompt
from trimtab.errors import NotFoundError, UsageError

FIELDS = ("text", "prompt", "source")
SETS = ("neutral",)
# Prompt of a text that has none of its own.
DEFAULT_REQUEST = "Write a short passage of text about anything you like."


def read_texts(source: str, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read the texts of one source.

    Rows with a blank text are skipped, because Hugging Face datasets of plain text contain many of them.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        columns: column names of the fields text, prompt and source, if they differ from the field names. A text without a
            prompt gets a neutral one.

    Returns:
        One prompt per text, with the text as its `target`.

    Raises:
        UsageError: if a column is missing, a row is invalid, or all texts are blank.
        NotFoundError: if `trimtab:NAME` is unknown.
    """
    name = source.removeprefix("trimtab:")
    if name != source and name not in SETS and name not in load_catalog():
        raise NotFoundError(f"no text set {source}; there are: {', '.join(f'trimtab:{n}' for n in SETS)}")
    rows = _read_packaged(name) if name != source and name in SETS else read_rows(source)
    names = rename_columns(FIELDS, columns, rows)
    texts = [text for number, row in enumerate(rows, 1) if (text := _parse_text(row, number, source, names))]
    if not texts:
        raise UsageError(f"{source}: all texts are empty")
    return texts


def read_all_texts(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read the texts of several sources, in order; see `read_texts`."""
    return [text for source in sources for text in read_texts(source, columns)]


def _parse_text(row: Row, number: int, source: str, names: Mapping[str, str]) -> Prompt | None:
    if names["text"] not in row:
        raise UsageError(f"{source} has no column {names['text']!r}; it has {', '.join(map(str, row))}. Set --columns.text")
    text, prompt = row[names["text"]], row.get(names["prompt"])
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or not (prompt is None or isinstance(prompt, str)):
        raise UsageError(f"{source}, row {number}: text and prompt must be text")
    question = (prompt or "").strip() or DEFAULT_REQUEST
    name = row.get(names["source"])
    origin = Path(source).stem.removeprefix("trimtab:") if name is None else str(name)
    return Prompt(question, "benign_easy", origin, question.lower(), target=text.strip())


def _read_packaged(name: str) -> list[Row]:
    text = (files("trimtab.data") / "prompts" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

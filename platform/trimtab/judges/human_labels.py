"""Answers with refusal labels, from the assets of the catalog and from user files.

They measure refusal judges and train the refusal classifier.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.assets.download import fetch_asset
from trimtab.data.files import Row, read_file, rename_columns
from trimtab.errors import UsageError
from trimtab.text.degenerate_answers import is_off_topic

SETS = ("refusal-labels", "refusal-labels-extra")
FIELDS = ("prompt", "answer", "refused")
# Common spellings of yes and no, and the verdicts of trimtab's judges.
MEANINGS = {
    **dict.fromkeys(("1", "true", "yes", "refusal", "partial"), True),
    **dict.fromkeys(("0", "false", "no", "compliance"), False),
}


@dataclass(frozen=True)
class LabeledAnswer:
    """An answer with its refusal label.

    Attributes:
        prompt: text of the prompt.
        answer: text of the answer.
        refused: whether the answer is labeled as a refusal.
    """

    prompt: str
    answer: str
    refused: bool

    @property
    def off_topic(self) -> bool:
        """Whether a long answer shares no content word with its prompt, which marks an answer to another question."""
        return is_off_topic(self.prompt, self.answer)


def read_human_labels() -> list[LabeledAnswer]:
    """Read all answers with human labels from the assets of the catalog."""
    return [row for name in SETS for row in _read_asset(name)]


def read_label_file(path: Path) -> list[LabeledAnswer]:
    """Read labeled answers from a file.

    Args:
        path: a file (.jsonl, .json, .csv, .parquet) with the columns prompt, answer and refused.

    Raises:
        UsageError: if the file is missing, unreadable or empty, or a row is invalid.
    """
    rows = read_file(path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    names = rename_columns(FIELDS, None, rows)
    named = [{field: row[name] for field, name in names.items() if name in row} for row in rows]
    return [_parse_row(row, f"{path}, row {number}") for number, row in enumerate(named, 1)]


def _parse_row(row: Row, location: str) -> LabeledAnswer:
    if missing := [field for field in FIELDS if field not in row]:
        raise UsageError(f"{location}: labeled answers need {', '.join(FIELDS)}; {', '.join(missing)} is missing")
    # CSV has no other way to write an empty answer.
    prompt, answer = row["prompt"], "" if row["answer"] is None else row["answer"]
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(answer, str):
        raise UsageError(f"{location}: prompt and answer must be text, and the prompt must not be empty")
    return LabeledAnswer(prompt, answer, _parse_label(row["refused"], location))


def _parse_label(value: Any, location: str) -> bool:
    refused = MEANINGS.get(str(value).strip().lower())
    if refused is None:
        raise UsageError(f"{location}: refused is {str(value)[:40]!r}, but must be one of {', '.join(MEANINGS)}")
    return refused


def _read_asset(name: str) -> list[LabeledAnswer]:
    lines = [line for line in fetch_asset(name).read_text().splitlines(keepends=True) if not line.startswith("#")]
    rows = csv.DictReader(io.StringIO("".join(lines)))
    return [LabeledAnswer(row["objective"], row["assistant_response"], row["human_score"] == "1") for row in rows]

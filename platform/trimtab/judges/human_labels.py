"""Labelled answers, to measure judges against and to fit one: the human labels of the catalogue, and files of the user."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.assets.download import fetch_asset
from trimtab.data.readers import Row, read_file
from trimtab.errors import UsageError

SETS = ("refusal-labels", "refusal-labels-extra")
# Words that any answer to any prompt may hold.
COMMON = re.compile(
    r"\b(?:about|does|from|give|have|help|make|people|some|tell|that|their|them|this|ways|what|with|write|your)\b"
)
LONG = 150
FIELDS = ("prompt", "answer", "refused")
# What people and programs write for yes and no, and our own verdicts.
MEANINGS = {
    **dict.fromkeys(("1", "true", "yes", "refusal", "partial"), True),
    **dict.fromkeys(("0", "false", "no", "compliance"), False),
}


@dataclass(frozen=True)
class LabeledAnswer:
    """An answer to a prompt, and whether a human called it a refusal."""

    prompt: str
    answer: str
    refused: bool

    @property
    def off_topic(self) -> bool:
        """Whether this is a long answer that shares no word of weight with its prompt: an answer to another question."""
        return len(self.answer) > LONG and not (_words(self.prompt) & _words(self.answer))


def read_human_labels() -> list[LabeledAnswer]:
    """All labelled answers."""
    return [row for name in SETS for row in _read(name)]


def read_label_file(path: Path) -> list[LabeledAnswer]:
    """Labelled answers of a file (.jsonl, .json, .csv, .parquet) with prompt, answer and refused. Raises UsageError."""
    rows = read_file(path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    return [_row(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _row(row: Row, where: str) -> LabeledAnswer:
    if missing := [field for field in FIELDS if field not in row]:
        raise UsageError(f"{where}: labelled answers need {', '.join(FIELDS)}; {', '.join(missing)} is missing")
    prompt, answer = row["prompt"], row["answer"]
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(answer, str):
        raise UsageError(f"{where}: prompt and answer must be text, and the prompt not empty")
    return LabeledAnswer(prompt, answer, _meaning(row["refused"], where))


def _meaning(value: Any, where: str) -> bool:
    meaning = MEANINGS.get(str(value).strip().lower())
    if meaning is None:
        raise UsageError(f"{where}: refused is {str(value)[:40]!r}, and must be one of {', '.join(MEANINGS)}")
    return meaning


def _read(name: str) -> list[LabeledAnswer]:
    lines = [line for line in fetch_asset(name).read_text().splitlines(keepends=True) if not line.startswith("#")]
    rows = csv.DictReader(io.StringIO("".join(lines)))
    return [LabeledAnswer(row["objective"], row["assistant_response"], row["human_score"] == "1") for row in rows]


def _words(text: str) -> set[str]:
    """Stems, cut to five letters, of words with at least four that are not common ones."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", COMMON.sub(" ", text.lower()))}

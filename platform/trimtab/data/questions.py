"""Reader of questions with reference answers.

It reads the same sources as the prompt reader (files, packaged sets, Hugging Face datasets) in the layouts of common QA sets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.assets.catalog import load_catalog
from trimtab.data.files import Row, parse_list, read_rows, rename_columns
from trimtab.data.prompt import Prompt
from trimtab.data.question_sets import SETS, read_question_set
from trimtab.errors import NotFoundError, UsageError
from trimtab.types import ANSWER_KINDS, AnswerKind

FIELDS = ("question", "answers", "context", "kind", "source", "group")
SEPARATORS = str.maketrans("|", ";")
# Precedes the final number in the worked answers of GSM8K.
FINAL_NUMBER_MARK = "####"


@dataclass(frozen=True)
class Question:
    """A question with its reference answers.

    Attributes:
        question: text of the question.
        answers: reference answers, aliases of one another. Empty if the question has no answer.
        source: name of the data source.
        kind: comparison to use with the reference answers, or None if the data does not specify one.
        context: text shown before the question.
        group: key of questions that a split keeps together, such as those about one country.
    """

    question: str
    answers: tuple[str, ...]
    source: str
    kind: AnswerKind | None = None
    context: str | None = None
    group: str | None = None

    @property
    def prompt(self) -> Prompt:
        """The question as a benign prompt."""
        text = f"{self.context}\n\n{self.question}" if self.context else self.question
        group = self.question.lower() if self.group is None else self.group
        return Prompt(text, "benign_easy", self.source, group)


def read_questions(source: str, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read the questions of one source.

    The answers field holds a list; text with aliases separated by `|` or `;`; a number, true or false; a worked answer that
    ends in `#### 42`; or an object in the layout of SQuAD (`text`) or TriviaQA (`value`, `aliases`). An empty list marks a
    question without an answer.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        columns: column names of the fields question, answers, context, kind, source and group, if they differ from the field
            names. Without an `answers` column, `answer` is read.

    Returns:
        One question per row, in order.

    Raises:
        UsageError: if a row is invalid; the message names the row and the remedy.
        NotFoundError: if `trimtab:NAME` is unknown.
    """
    name = source.removeprefix("trimtab:")
    if name != source and name in SETS:
        return _parse_questions(read_question_set(name), source, columns)
    if name != source and name not in load_catalog():
        available = ", ".join(f"trimtab:{n}" for n in SETS)
        raise NotFoundError(f"no question set {source}; there are: {available}")
    return _parse_questions(read_rows(source), source, columns)


def read_all_questions(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read the questions of several sources, in order; see `read_questions`."""
    return [question for source in sources for question in read_questions(source, columns)]


def _parse_questions(rows: Sequence[Row], source: str, columns: Mapping[str, str] | None) -> list[Question]:
    names = rename_columns(FIELDS, columns, rows)
    if not any(names["answers"] in row for row in rows) and "answers" not in (columns or {}):
        # Many data sets use the singular.
        singular = rename_columns(FIELDS, {"answers": "answer", **(columns or {})}, rows)
        names = singular if any(singular["answers"] in row for row in rows) else names
    return [_parse_question(row, number, source, names) for number, row in enumerate(rows, 1)]


def _parse_question(row: Row, number: int, source: str, names: Mapping[str, str]) -> Question:
    location = f"{source}, row {number}"
    value = row[get_column_name(row, source, "answers", names["answers"])]
    answers, implied_kind = _parse_aliases(value, location)
    kind_name = implied_kind if row.get(names["kind"]) is None else row[names["kind"]]
    kind: AnswerKind | None = next((k for k in ANSWER_KINDS if k == kind_name), None)
    if kind_name is not None and kind is None:
        raise UsageError(f"{location}: kind {kind_name!r} must be one of {', '.join(ANSWER_KINDS)}")
    return build_question(row, number, source, names, answers, kind)


def build_question(
    row: Row,
    number: int,
    source: str,
    names: Mapping[str, str],
    answers: tuple[str, ...] = (),
    kind: AnswerKind | None = None,
) -> Question:
    """Build the question of a row.

    Args:
        row: fields of the row.
        number: row number from 1, for error messages.
        source: source of the row, for error messages and as the default source name.
        names: column name of each field.
        answers: reference answers, aliases of one another.
        kind: comparison to use with the answers.

    Raises:
        UsageError: if the row has no question column, or its question is empty or not text.
    """
    text = row.get(get_column_name(row, source, "question", names["question"]))
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{source}, row {number}: the question is empty or not text")
    context, group, name = (row.get(names[field]) for field in ("context", "group", "source"))
    return Question(
        question=text.strip(),
        answers=answers,
        source=Path(source).stem.removeprefix("trimtab:") if name is None else str(name),
        kind=kind,
        context=None if context is None else str(context).strip() or None,
        group=None if group is None else str(group),
    )


def get_column_name(row: Row, source: str, field: str, name: str) -> str:
    """Return the column name of a field after checking that the row has the column.

    Args:
        row: fields of the row.
        source: source of the row, for the error message.
        field: name of the field, for the error message.
        name: name of the column.

    Raises:
        UsageError: if the row has no such column.
    """
    if name not in row:
        raise UsageError(f"{source} has no column {name!r}; it has {', '.join(map(str, row))}. Set --columns.{field}")
    return name


def _parse_aliases(field: Any, location: str) -> tuple[tuple[str, ...], AnswerKind | None]:
    """Return the aliases in an answers field, and the kind of comparison that its layout implies."""
    if isinstance(field, str) and FINAL_NUMBER_MARK in field:
        return (_as_text(field.rpartition(FINAL_NUMBER_MARK)[2], location),), "numeric"
    values = _parse_values(field, location)
    aliases = tuple(dict.fromkeys(text for value in values if (text := _as_text(value, location))))
    if not aliases and values != []:
        raise UsageError(f"{location}: the answer is empty. Give an empty list for a question without an answer")
    return aliases, None


def _parse_values(field: Any, location: str) -> list[Any]:
    if isinstance(field, str):
        values = parse_list(field, location)
        return field.translate(SEPARATORS).split(";") if values is None else values
    if isinstance(field, Mapping) and "text" in field:
        return _parse_values(field["text"], location)
    if isinstance(field, Mapping) and "value" in field:
        return [field["value"], *(field.get("aliases") or [])]
    if isinstance(field, Mapping):
        raise UsageError(f"{location}: answers are an object without text or value. Give a list or text")
    return list(field) if isinstance(field, list | tuple) else [field]


def _as_text(value: Any, location: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise UsageError(f"{location}: an answer must be text or a number, not {type(value).__name__}")
    return str(value).strip()

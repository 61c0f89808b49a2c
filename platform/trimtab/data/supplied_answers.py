"""Reader of pre-written answers with their questions and truth labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.files import Row, parse_list, read_rows, rename_columns
from trimtab.data.questions import Question, build_question, get_column_name
from trimtab.errors import UsageError

LABELS = ("truthful", "hallucinated")
FIELDS = ("question", "context", "kind", "source", "group", "answer", *LABELS, "correct_answers", "incorrect_answers")
MEANINGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class SuppliedAnswer:
    """A pre-written answer to a question.

    Attributes:
        question: the question that it answers.
        text: the answer.
        truthful: whether the answer is right, or None if it is unlabeled.
    """

    question: Question
    text: str
    truthful: bool | None


def read_supplied_answers(
    source: str, columns: Mapping[str, str] | None = None, separator: str | None = None
) -> list[SuppliedAnswer]:
    """Read the answers of one source.

    A row has either one answer in `answer`, with its label in `truthful` or, reversed, in `hallucinated` (true, false, or empty
    if unknown); or right answers in `correct_answers` and wrong answers in `incorrect_answers`, each a text or a list of texts.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        columns: column names of the fields question, context, kind, source, group, answer, truthful, hallucinated,
            correct_answers and incorrect_answers, if they differ from the field names.
        separator: separator of several answers within one text of `correct_answers` or `incorrect_answers`. Without it, a text
            is one answer.

    Returns:
        All answers in the order of the rows. A row may yield several.

    Raises:
        UsageError: if a row is invalid; the message names the row and the remedy.
    """
    rows = read_rows(source)
    names = rename_columns(FIELDS, columns, rows)
    return [answer for number, row in enumerate(rows, 1) for answer in _parse_row(row, number, source, names, separator)]


def read_all_supplied_answers(
    sources: Sequence[str], columns: Mapping[str, str] | None = None, separator: str | None = None
) -> list[SuppliedAnswer]:
    """Read the answers of several sources, in order; see `read_supplied_answers`."""
    return [answer for source in sources for answer in read_supplied_answers(source, columns, separator)]


def _parse_row(row: Row, number: int, source: str, names: Mapping[str, str], separator: str | None) -> Iterator[SuppliedAnswer]:
    location = f"{source}, row {number}"
    question = build_question(row, number, source, names)
    lists = [name for name in (names["correct_answers"], names["incorrect_answers"]) if row.get(name) is not None]
    if names["answer"] in row and lists:
        raise UsageError(f"{location} has both {names['answer']} and {lists[0]}. Rename one with --columns")
    if names["answer"] in row:
        text = row[names["answer"]]
        if not isinstance(text, str):
            raise UsageError(
                f"{location}: an answer must be one text, not {type(text).__name__}. Use correct_answers and "
                "incorrect_answers for several"
            )
        yield SuppliedAnswer(question, text.strip(), _parse_label(row, names, location))
        return
    if names["correct_answers"] not in row and names["incorrect_answers"] not in row:
        # Raises an error that lists the columns.
        get_column_name(row, source, "answer", names["answer"])
    for field, truthful in (("correct_answers", True), ("incorrect_answers", False)):
        for text in _split_texts(row.get(names[field]), location, separator):
            yield SuppliedAnswer(question, text, truthful)


def _split_texts(value: Any, location: str, separator: str | None) -> list[str]:
    """Return the answers in a field; an absent value and blank texts yield none."""
    if value is None:
        return []
    if isinstance(value, str) and (values := parse_list(value, location)) is not None:
        value = values
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{location}: an answer must be text, not {type(value).__name__}")
    pieces = [piece for part in parts for piece in (part.split(separator) if separator else [part])]
    return [piece.strip() for piece in pieces if piece.strip()]


def _parse_label(row: Row, names: Mapping[str, str], location: str) -> bool | None:
    """Return whether the answer of a row is truthful; None if it is unlabeled."""
    values = {field: row.get(names[field]) for field in LABELS}
    present = {field: value for field, value in values.items() if value is not None and value != ""}
    if len(present) > 1:
        raise UsageError(f"{location} has both {' and '.join(names[field] for field in LABELS)}. Remove one of the columns")
    for field, value in present.items():
        if (meaning := MEANINGS.get(str(value).strip().lower().removesuffix(".0"))) is None:
            raise UsageError(f"{location}: {names[field]} is {value!r}, but must be true, false, or empty if unknown")
        return meaning if field == "truthful" else not meaning
    return None

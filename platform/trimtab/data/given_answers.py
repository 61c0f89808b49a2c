"""Read answers that someone else wrote, with their questions and whether they are right: what labelled sets hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.questions import Question, get_column_name, list_unique_questions
from trimtab.data.readers import Row, read_rows, rename_columns
from trimtab.errors import UsageError

FIELDS = ("question", "context", "kind", "source", "group", "given", "truthful", "right", "wrong")


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to a question, and whether it is right; None where nobody said."""

    question: Question
    text: str
    truthful: bool | None


def read_given_answers(
    source: str, columns: Mapping[str, str] | None = None, separator: str | None = None
) -> list[GivenAnswer]:
    """Answers of one source.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        columns: other names of the fields question, context, kind, source, group, given, truthful, right and wrong.
        separator: what stands between several answers in one text; without it a text is one answer.

    A row has an answer as `given`, and whether it is right as `truthful` (true, false, or nothing where it is not known); or it
    has answers that are `right` and others that are `wrong`, one or a list each.

    Raises UsageError, naming the row and what to do.
    """
    names = rename_columns(FIELDS, columns)
    rows = enumerate(read_rows(source), 1)
    return [given for number, row in rows for given in _parse_row(row, number, source, names, separator)]


def read_all_given_answers(
    sources: Sequence[str], columns: Mapping[str, str] | None = None, separator: str | None = None
) -> list[GivenAnswer]:
    """Answers of several sources, in order."""
    return [given for source in sources for given in read_given_answers(source, columns, separator)]


def _parse_row(row: Row, number: int, source: str, names: Mapping[str, str], separator: str | None) -> Iterator[GivenAnswer]:
    where = f"{source}, row {number}"
    question = list_unique_questions(row, number, source, names)
    if names["given"] in row:
        text = row[names["given"]]
        if not isinstance(text, str):
            raise UsageError(
                f"{where}: a given answer must be one text, not {type(text).__name__}; several go as right and wrong"
            )
        yield GivenAnswer(question, text.strip(), _parse_truth(row.get(names["truthful"]), where))
        return
    if names["right"] not in row and names["wrong"] not in row:
        # Its error says which columns there are.
        get_column_name(row, source, "given", names["given"])
    for field, truthful in (("right", True), ("wrong", False)):
        for text in _split_texts(row.get(names[field]), where, separator):
            yield GivenAnswer(question, text, truthful)


def _split_texts(value: Any, where: str, separator: str | None) -> list[str]:
    """The answers that a field holds; an empty one, as of an empty cell, is none."""
    if value is None or value != value:
        return []
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{where}: a given answer must be text, not {type(value).__name__}")
    cut = [piece for part in parts for piece in (part.split(separator) if separator else [part])]
    return [piece.strip() for piece in cut if piece.strip()]


def _parse_truth(value: Any, where: str) -> bool | None:
    if value is None or value == "" or value != value:
        return None
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (found := known.get(str(value).strip().lower().removesuffix(".0"))) is None:
        raise UsageError(f"{where}: truthful is {value!r}, and must be true, false, or empty where it is not known")
    return found

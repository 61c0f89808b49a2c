"""Read questions with their answers: the files and hubs that prompts are read from, in the layouts that common sets have."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.assets.catalog import load_catalog
from trimtab.data.prompt import Prompt
from trimtab.data.question_sets import SETS, read_question_set
from trimtab.data.readers import Row, read_rows, rename_columns
from trimtab.errors import NotFoundError, UsageError
from trimtab.types import ANSWER_KINDS, AnswerKind

FIELDS = ("question", "answers", "context", "kind", "source", "group")
SEPARATORS = str.maketrans("|", ";")
# What stands before the final number in GSM8K's worked answers.
HASHES = "####"


@dataclass(frozen=True)
class Question:
    """A question, the answers that are right (aliases of one another; none where there is no answer), and how to compare with
    them where the data say so. `context` is shown before the question. Questions of one `group`, as those about one country,
    are never parted by a split."""

    question: str
    answers: tuple[str, ...]
    source: str
    kind: AnswerKind | None = None
    context: str | None = None
    group: str | None = None

    @property
    def prompt(self) -> Prompt:
        """The question as a prompt that anyone may be asked."""
        text = f"{self.context}\n\n{self.question}" if self.context else self.question
        return Prompt(text, "benign_easy", self.source, self.group or self.question.lower())


def read_questions(source: str, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Questions of one source.

    Args:
        source: a file (.jsonl, .json, .csv, .parquet), `trimtab:NAME`, or a Hugging Face dataset `org/name[/config][:split]`.
        columns: other names of the fields question, answers, context, kind, source and group. Where there is no `answers`,
            `answer` is read.

    Answers are a list; text with aliases between `|` or `;`; a number, true or false; a worked answer that ends in `#### 42`;
    or an object as SQuAD (`text`) and TriviaQA (`value`, `aliases`) have them. An empty list says that there is no answer.

    Raises UsageError, naming the row and what to do; NotFoundError for an unknown `trimtab:NAME`.
    """
    names = rename_columns(FIELDS, columns)
    name = source.removeprefix("trimtab:")
    if name != source and name in SETS:
        return [_parse_question(row, number, source, names) for number, row in enumerate(read_question_set(name), 1)]
    if name != source and name not in load_catalog():
        known = ", ".join(f"trimtab:{n}" for n in SETS)
        raise NotFoundError(f"no question set {source}; there are: {known}")
    return [_parse_question(row, number, source, names) for number, row in enumerate(read_rows(source), 1)]


def read_all_questions(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> list[Question]:
    """Questions of several sources, in order."""
    return [question for source in sources for question in read_questions(source, columns)]


def _parse_question(row: Row, number: int, source: str, names: Mapping[str, str]) -> Question:
    where = f"{source}, row {number}"
    fallback = "answer" if names["answers"] == "answers" and "answers" not in row and "answer" in row else names["answers"]
    given = row[get_column_name(row, source, "answers", fallback)]
    answers, found = _parse_aliases(given, where)
    wanted = row.get(names["kind"]) or found
    kind: AnswerKind | None = next((k for k in ANSWER_KINDS if k == wanted), None)
    if wanted and kind is None:
        raise UsageError(f"{where}: kind {wanted!r} must be one of {', '.join(ANSWER_KINDS)}")
    return list_unique_questions(row, number, source, names, answers, kind)


def list_unique_questions(
    row: Row,
    number: int,
    source: str,
    names: Mapping[str, str],
    answers: tuple[str, ...] = (),
    kind: AnswerKind | None = None,
) -> Question:
    """A row's question with these answers. Raises UsageError where it has none."""
    text = row.get(get_column_name(row, source, "question", names["question"]))
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{source}, row {number}: the question is empty or not text")
    context, group = row.get(names["context"]), row.get(names["group"])
    return Question(
        question=text.strip(),
        answers=answers,
        source=str(row.get(names["source"]) or Path(source).stem.removeprefix("trimtab:")),
        kind=kind,
        context=str(context).strip() if context else None,
        group=str(group) if group else None,
    )


def get_column_name(row: Row, source: str, field: str, name: str) -> str:
    """The column of a field. Raises UsageError where a row has none of that name."""
    if name not in row:
        raise UsageError(
            f"{source} has no column {name!r}; it has {', '.join(map(str, row))}: name yours with --columns.{field}"
        )
    return name


def _parse_aliases(given: Any, where: str) -> tuple[tuple[str, ...], AnswerKind | None]:
    """The aliases that a field holds, and the kind of comparison that its layout calls for."""
    if isinstance(given, str) and HASHES in given:
        return (_as_text(given.rpartition(HASHES)[2], where),), "numeric"
    values = _parse_values(given, where)
    aliases = tuple(dict.fromkeys(text for value in values if (text := _as_text(value, where))))
    if not aliases and values != []:
        raise UsageError(f"{where}: the answer is empty; a question that has no answer has an empty list")
    return aliases, None


def _parse_values(given: Any, where: str) -> list[Any]:
    if isinstance(given, str):
        listed = _as_list(given)
        return given.translate(SEPARATORS).split(";") if listed is None else listed
    if isinstance(given, Mapping) and "text" in given:
        return _parse_values(given["text"], where)
    if isinstance(given, Mapping) and "value" in given:
        return [given["value"], *(given.get("aliases") or [])]
    if isinstance(given, Mapping):
        raise UsageError(f"{where}: answers are an object without text or value; give a list, or text")
    return list(given) if isinstance(given, list | tuple) else [given]


def _as_list(text: str) -> list[Any] | None:
    """A list that a CSV holds as JSON; None where it is something else."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, list) else None


def _as_text(value: Any, where: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise UsageError(f"{where}: an answer is {type(value).__name__}, and must be text or a number")
    return str(value).strip()

"""What is asked of the model or read with it for a data set of signals, and how its answers are labelled."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.answers import Sampling
from trimtab.data import given as givens
from trimtab.data import questions as asks
from trimtab.data.given import Given
from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.judges.answer_endpoint import AnswerEndpoint
from trimtab.judges.answers import mark
from trimtab.words import AnswerKind

from .answer_store import Request
from .collect_config import CollectConfig
from .config import sources
from .judge_config import JudgeConfig

DEFAULT_KIND: AnswerKind = "contains"
Label = tuple[bool | None, str]
"""Whether an answer is right, None where that is not known, and why."""


@dataclass(frozen=True)
class Asked:
    """A question with its key in the data set, and how its answer is judged, or what a given one is known to be."""

    key: str
    question: Question
    kind: AnswerKind
    request: Request
    truthful: bool | None = None


def planned(config: CollectConfig) -> list[Asked]:
    """All that the settings ask for. Raises UsageError for sources that cannot be read, or hold nothing."""
    files = sources(config.questions)
    if config.given:
        return plan_given(config, givens.read_all(files, config.columns, config.separator))
    return plan(config, asks.read_all(files, config.columns))


def plan(config: CollectConfig, questions: Sequence[Question]) -> list[Asked]:
    """What is asked, each once. A key names the question and the answers it is compared with."""
    sampling = Sampling(max_tokens=config.max_tokens)
    found: dict[str, Asked] = {}
    for question in questions:
        kind = config.kind or question.kind or DEFAULT_KIND
        what = json.dumps([question.prompt.messages, question.answers, kind])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        found.setdefault(key, Asked(key, question, kind, Request(question.prompt.messages, sampling)))
    return _some(config, found)


def plan_given(config: CollectConfig, answers: Sequence[Given]) -> list[Asked]:
    """Answers that are read, each once. A key names the question, the answer, and whether it is right."""
    found: dict[str, Asked] = {}
    for given in answers:
        what = json.dumps([given.question.prompt.messages, given.text, given.truthful])
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        request = Request(given.question.prompt.messages, Sampling(max_tokens=config.max_tokens), given.text)
        found.setdefault(key, Asked(key, given.question, DEFAULT_KIND, request, given.truthful))
    return _some(config, found)


def labelled(pairs: Sequence[tuple[Asked, str]], judge: JudgeConfig) -> list[Label]:
    """Whether answers are right, and why: as their file says, where they are given; else as the endpoint says, or by comparing
    with those wanted. Raises JobError where the endpoint does not say."""
    if pairs and pairs[0][0].request.given is not None:
        return [(a.truthful, "as the file says" if a.truthful is not None else "nobody said") for a, _ in pairs]
    if judge.kind == "endpoint":
        questions = [str(a.request.messages[-1]["content"]) for a, _ in pairs]
        asker = AnswerEndpoint(judge.url or "", judge.model or "", judge.concurrency)
        marks = asker.marks(questions, [a.question.answers for a, _ in pairs], [text for _, text in pairs])
    else:
        marks = [mark(a.kind, text, a.question.answers) for a, text in pairs]
    return [(None if m.abstained else m.right, m.why) for m in marks]


def _some(config: CollectConfig, found: Mapping[str, Asked]) -> list[Asked]:
    if not found:
        raise UsageError(f"there is nothing to ask or to read in {', '.join(sources(config.questions))}")
    # By their keys: any order that is always the same, and has nothing to do with what is asked.
    return sorted(found.values(), key=lambda a: a.key)[: config.limit] if config.limit else list(found.values())

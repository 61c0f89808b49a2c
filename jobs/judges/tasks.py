"""Tasks of the classifier judge, each in a process of its own: fitting a head, and giving its verdicts."""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from trimtab.generation_types import Progress
from trimtab.judges import cross_validation, refusal_classifier, refusal_head
from trimtab.judges.cross_validation import Table
from trimtab.judges.human_agreement import Agreement, agreement, on_human_labels
from trimtab.judges.human_labels import Labelled
from trimtab.judges.refusal_classifier import Classifier
from trimtab.judges.refusal_head import Head, HeadCard
from trimtab.model import base_model
from trimtab.model.base_model import BaseModel
from trimtab.types import Precision, Verdict

OWN = "labels of your own"


@dataclass(frozen=True)
class Lesson:
    """What a head is fitted on: human labels, labels of the user, and how the answers are read."""

    human: Sequence[Labelled]
    own: Sequence[Labelled]
    tokens: int
    precision: Precision
    device: str


def classify(tell: Progress, judge: Classifier, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """The classifier's verdicts."""
    return replace(judge, base=base_model.here(judge.base)).judge(prompts, answers, tell)


def fit_head(tell: Progress, base: BaseModel, lesson: Lesson) -> Head:
    """A head fitted on all the labels, with its standing on labels that it was not fitted on, by nested cross-validation.

    Empty answers teach nothing: every judge calls them refusals."""
    local = base_model.here(base)
    lesson = replace(lesson, human=_with_words(lesson.human), own=_with_words(lesson.own))
    rows = [*lesson.human, *lesson.own]
    layers = refusal_classifier.candidates(local)
    precision = base_model.resolved(lesson.precision)
    states = refusal_classifier.states(local, [r.answer for r in rows], layers, lesson.tokens, precision, lesson.device)
    # People called answers to another question refusals: true, but not to be seen in an answer alone.
    taught = torch.tensor([not r.off_topic for r in lesson.human] + [True] * len(lesson.own))
    table = Table(states, torch.tensor([r.refused for r in rows]), taught, cross_validation.groups(rows))
    with _one_thread():
        odds = cross_validation.out_of_fold(table, tell).tolist()
        choice = cross_validation.choose(table)
        weights = cross_validation.fit(table, choice)
    verdicts: list[Verdict] = [refusal_classifier.verdict(row.answer, odd > 0) for row, odd in zip(rows, odds, strict=True)]
    tell(cross_validation.FOLDS + 1, cross_validation.FOLDS + 1)
    card = HeadCard(
        base=base.name,
        fingerprint=base.fingerprint,
        width=base.width,
        layer=layers[choice.layer],
        tokens=lesson.tokens,
        precision=precision,
        l2=choice.l2,
        folds=cross_validation.FOLDS,
        digest="",
        data=[_entry(name, chosen) for name, chosen in (("human", lesson.human), ("own", lesson.own)) if chosen],
        agreements=[asdict(a) for a in _agreements(verdicts, lesson)],
    )
    return refusal_head.make(weights, card)


def _with_words(rows: Sequence[Labelled]) -> list[Labelled]:
    return [row for row in rows if row.answer.strip()]


@contextmanager
def _one_thread() -> Generator[None]:
    """Hundreds of small fits: threads that wait for one another make them many times slower on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _agreements(verdicts: Sequence[Verdict], lesson: Lesson) -> list[Agreement]:
    count = len(lesson.human)
    found = on_human_labels(verdicts[:count], lesson.human)
    if lesson.own:
        found.append(agreement(verdicts[count:], [row.refused for row in lesson.own], OWN))
    return found


def _entry(name: str, rows: Sequence[Labelled]) -> dict[str, str | int]:
    text = "\n".join(json.dumps(asdict(row), sort_keys=True) for row in rows)
    return {"name": name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16], "rows": len(rows)}

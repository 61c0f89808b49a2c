"""Tasks of the classifier judge, each in a process of its own: fitting a head, and giving its verdicts."""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from trimtab.generation_types import Progress
from trimtab.judges.cross_validation import FOLDS, LabeledStates, choose_head, fit_head, group_rows, predict_out_of_fold
from trimtab.judges.human_agreement import JudgeAgreement, compute_agreement, compute_label_agreements
from trimtab.judges.human_labels import LabeledAnswer
from trimtab.judges.refusal_classifier import RefusalClassifier, classify_answer, compute_states, list_candidate_layers
from trimtab.judges.refusal_head import RefusalHead, RefusalHeadCard, build_head
from trimtab.model.base_model import BaseModel, resolve_on_node, resolve_precision
from trimtab.types import Precision, Verdict

OWN = "labels of your own"


@dataclass(frozen=True)
class FitRequest:
    """What a head is fitted on: human labels, labels of the user, and how the answers are read."""

    human: Sequence[LabeledAnswer]
    own: Sequence[LabeledAnswer]
    tokens: int
    precision: Precision
    device: str


def classify_answers(tell: Progress, judge: RefusalClassifier, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """The classifier's verdicts."""
    return replace(judge, base=resolve_on_node(judge.base)).judge_answers(prompts, answers, tell)


def fit_refusal_head(tell: Progress, base: BaseModel, lesson: FitRequest) -> RefusalHead:
    """A head fitted on all the labels, with its standing on labels that it was not fitted on, by nested cross-validation.

    Empty answers teach nothing: every judge calls them refusals."""
    local = resolve_on_node(base)
    lesson = replace(lesson, human=_with_words(lesson.human), own=_with_words(lesson.own))
    rows = [*lesson.human, *lesson.own]
    layers = list_candidate_layers(local)
    precision = resolve_precision(lesson.precision)
    states = compute_states(local, [r.answer for r in rows], layers, lesson.tokens, precision, lesson.device)
    # People called answers to another question refusals: true, but not to be seen in an answer alone.
    taught = torch.tensor([not r.off_topic for r in lesson.human] + [True] * len(lesson.own))
    table = LabeledStates(states, torch.tensor([r.refused for r in rows]), taught, group_rows(rows))
    with _one_thread():
        odds = predict_out_of_fold(table, tell).tolist()
        choice = choose_head(table)
        weights = fit_head(table, choice)
    verdicts: list[Verdict] = [classify_answer(row.answer, odd > 0) for row, odd in zip(rows, odds, strict=True)]
    tell(FOLDS + 1, FOLDS + 1)
    card = RefusalHeadCard(
        base=base.name,
        fingerprint=base.fingerprint,
        width=base.width,
        layer=layers[choice.layer],
        tokens=lesson.tokens,
        precision=precision,
        l2=choice.l2,
        folds=FOLDS,
        digest="",
        data=[_entry(name, chosen) for name, chosen in (("human", lesson.human), ("own", lesson.own)) if chosen],
        agreements=[asdict(a) for a in _agreements(verdicts, lesson)],
    )
    return build_head(weights, card)


def _with_words(rows: Sequence[LabeledAnswer]) -> list[LabeledAnswer]:
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


def _agreements(verdicts: Sequence[Verdict], lesson: FitRequest) -> list[JudgeAgreement]:
    count = len(lesson.human)
    found = compute_label_agreements(verdicts[:count], lesson.human)
    if lesson.own:
        found.append(compute_agreement(verdicts[count:], [row.refused for row in lesson.own], OWN))
    return found


def _entry(name: str, rows: Sequence[LabeledAnswer]) -> dict[str, str | int]:
    text = "\n".join(json.dumps(asdict(row), sort_keys=True) for row in rows)
    return {"name": name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16], "rows": len(rows)}

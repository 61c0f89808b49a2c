"""Tasks of the classifier judge: fit a head, and classify answers.

Each task runs in its own process.
"""

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
from trimtab.model.base_model import BaseModel, resolve_dtype, resolve_on_node
from trimtab.types import DType, Verdict
from trimtab.util.identifiers import compute_key

OWN = "user labels"


@dataclass(frozen=True)
class FitRequest:
    """Request to fit a head.

    Attributes:
        human: human labels of the asset.
        own: labels of the user.
        tokens: number of leading tokens of an answer to read.
        precision: data type of the model.
        device: device of the model.
    """

    human: Sequence[LabeledAnswer]
    own: Sequence[LabeledAnswer]
    tokens: int
    precision: DType
    device: str


def classify_answers(
    progress: Progress, judge: RefusalClassifier, prompts: Sequence[str], answers: Sequence[str]
) -> list[Verdict]:
    """Classify answers.

    Args:
        progress: progress callback.
        judge: classifier.
        prompts: prompts [N].
        answers: answers [N].

    Returns:
        Verdicts [N].
    """
    return replace(judge, base=resolve_on_node(judge.base)).judge_answers(prompts, answers, progress)


def fit_refusal_head(progress: Progress, base: BaseModel, request: FitRequest) -> RefusalHead:
    """Fit a head on all labels, and measure it on held-out labels by nested cross-validation.

    Empty answers are excluded, because every judge calls them refusals.

    Args:
        progress: progress callback.
        base: base model.
        request: labels and settings.
    """
    local = resolve_on_node(base)
    request = replace(request, human=_drop_empty(request.human), own=_drop_empty(request.own))
    rows = [*request.human, *request.own]
    layers = list_candidate_layers(local)
    precision = resolve_dtype(request.precision)
    states = compute_states(local, [r.answer for r in rows], layers, request.tokens, precision, request.device)
    # Annotators labeled answers to another question as refusals, which the answer alone cannot show.
    trainable = torch.tensor([not r.off_topic for r in request.human] + [True] * len(request.own))
    table = LabeledStates(states, torch.tensor([r.refused for r in rows]), trainable, group_rows(rows))
    with _one_thread():
        odds = predict_out_of_fold(table, progress).tolist()
        choice = choose_head(table)
        weights = fit_head(table, choice)
    verdicts: list[Verdict] = [classify_answer(row.answer, odd > 0) for row, odd in zip(rows, odds, strict=True)]
    progress(FOLDS + 1, FOLDS + 1)
    card = RefusalHeadCard(
        base=base.name,
        fingerprint=base.fingerprint,
        width=base.width,
        layer=layers[choice.layer],
        max_answer_tokens=request.tokens,
        dtype=precision,
        l2=choice.l2,
        folds=FOLDS,
        digest="",
        data=[_describe_labels(name, labels) for name, labels in (("human", request.human), ("own", request.own)) if labels],
        agreements=[asdict(a) for a in _compute_agreements(verdicts, request)],
    )
    return build_head(weights, card)


def _drop_empty(rows: Sequence[LabeledAnswer]) -> list[LabeledAnswer]:
    return [row for row in rows if row.answer.strip()]


@contextmanager
def _one_thread() -> Generator[None]:
    """Limit torch to one thread: for many small fits on a busy machine, thread synchronization dominates the run time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compute_agreements(verdicts: Sequence[Verdict], request: FitRequest) -> list[JudgeAgreement]:
    count = len(request.human)
    agreements = compute_label_agreements(verdicts[:count], request.human)
    if request.own:
        agreements.append(compute_agreement(verdicts[count:], [row.refused for row in request.own], OWN))
    return agreements


def _describe_labels(name: str, rows: Sequence[LabeledAnswer]) -> dict[str, str | int]:
    text = "\n".join(json.dumps(asdict(row), sort_keys=True) for row in rows)
    return {"name": name, "digest": compute_key(text, 16), "rows": len(rows)}

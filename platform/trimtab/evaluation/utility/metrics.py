"""Utility suites: what an arm costs in ability, on questions with known answers and on neutral text.

Answers are sampled by an engine and texts are read by the frozen model; here both become figures, arm by arm, over seeds, and
against the base arm on the same questions and texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.data.questions import Question
from trimtab.errors import UsageError
from trimtab.evaluation.safety.comparison import get_arm_name, pigeonhole_bootstrap
from trimtab.evaluation.utility.text_scoring import TextScore
from trimtab.judges.answer_matching import AnswerMark, mark_answer
from trimtab.stats.intervals import Estimate, Rate, bootstrap_mean, compute_wilson_interval
from trimtab.types import BASE_ARM


@dataclass(frozen=True)
class MarkedAnswer:
    """One answer to a question, with its mark."""

    question: Question
    answer: str
    mark: AnswerMark


@dataclass(frozen=True)
class MeasuredArm:
    """An arm with one seed on one suite: its answers and its readings, of which either may be empty."""

    name: str
    answers: Sequence[MarkedAnswer] = ()
    readings: Sequence[TextScore] = ()


@dataclass(frozen=True)
class AnsweringMetrics:
    """An arm on a suite's questions, over its seeds. `accuracy` is the mean mark (of f1: the mean F1), `change` the difference
    to the base arm's on the same questions; `abstained` the share that is not right and does not try; `sets` accuracy by
    source."""

    accuracy: Rate
    change: Estimate
    abstained: Rate
    sets: Mapping[str, Rate]


@dataclass(frozen=True)
class ReadingMetrics:
    """An arm on a suite's texts, over its seeds: `perplexity` per token, `factor` what it is times the base arm's on the same
    texts, `kl` the mean KL(base || arm) per token in nats."""

    perplexity: Estimate
    factor: Estimate
    kl: Estimate


@dataclass(frozen=True)
class UtilityMetrics:
    """An arm of a suite over `seeds` seeds."""

    arm: str
    seeds: int
    answering: AnsweringMetrics | None
    reads: ReadingMetrics | None


def mark_answers(question: Question, answer: str) -> MarkedAnswer:
    """An answer and its mark: compared as the question says, else whether it holds a wanted answer."""
    return MarkedAnswer(question, answer, mark_answer(question.kind or "contains", answer, question.answers))


def compute_metrics(measured: Sequence[MeasuredArm]) -> list[UtilityMetrics]:
    """Every arm over its seeds (`sta#1` and `sta#2` are seeds of `sta`), in the order in which they come.

    Raises UsageError where there is no base arm, or arms were not measured on the same.
    """
    base = next((m for m in measured if m.name == BASE_ARM), None)
    if base is None:
        raise UsageError(f"utility is told against the arm {BASE_ARM!r}, and there is none")
    arms: dict[str, list[MeasuredArm]] = {}
    for one in measured:
        same = [a.question.question for a in one.answers] == [a.question.question for a in base.answers]
        if not same or [r.tokens for r in one.readings] != [r.tokens for r in base.readings]:
            raise UsageError(f"{one.name} was measured on other questions or texts than {base.name}")
        arms.setdefault(get_arm_name(one.name), []).append(one)
    return [
        UtilityMetrics(
            arm=name,
            seeds=len(seeds),
            answering=_compute_answering(seeds, base) if base.answers else None,
            reads=_compute_reading(seeds, base) if base.readings else None,
        )
        for name, seeds in arms.items()
    ]


def _compute_answering(seeds: Sequence[MeasuredArm], base: MeasuredArm) -> AnsweringMetrics:
    scores = _build_table([[a.mark.score for a in one.answers] for one in seeds])
    silent = _build_table([[float(a.mark.abstained) for a in one.answers] for one in seeds])
    sources: dict[str, list[int]] = {}
    for i, a in enumerate(base.answers):
        sources.setdefault(a.question.source, []).append(i)
    return AnsweringMetrics(
        accuracy=_compute_rate(scores),
        change=bootstrap_mean(scores - _build_table([[a.mark.score for a in base.answers]])),
        abstained=_compute_rate(silent),
        sets={source: _compute_rate(scores[:, mine]) for source, mine in sorted(sources.items())},
    )


def _compute_reading(seeds: Sequence[MeasuredArm], base: MeasuredArm) -> ReadingMetrics:
    tokens = torch.tensor([r.tokens for r in base.readings])
    nll = _build_table([[r.nll for r in one.readings] for one in seeds])
    return ReadingMetrics(
        perplexity=bootstrap_mean(nll, tokens).map_values(),
        factor=bootstrap_mean(nll - _build_table([[r.nll for r in base.readings]]), tokens).map_values(),
        kl=bootstrap_mean(_build_table([[r.kl for r in one.readings] for one in seeds]), tokens),
    )


def _compute_rate(scores: Tensor) -> Rate:
    """Mean of scores [seeds, questions] in [0, 1]; Wilson's interval is no narrower for them than for right and wrong."""
    return compute_wilson_interval(scores.sum().item(), scores.shape[1]) if len(scores) == 1 else pigeonhole_bootstrap([scores])


def _build_table(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.double)

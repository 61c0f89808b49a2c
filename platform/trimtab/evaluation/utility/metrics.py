"""Utility metrics: loss of ability caused by an arm, on questions with reference answers and on neutral text.

An engine generates the answers, and the frozen model scores the texts. The metrics pool each arm over its seeds and compare it
with the base arm on the same questions and texts.
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
from trimtab.stats.bootstrap import bootstrap_mean
from trimtab.stats.intervals import Estimate, Rate, compute_wilson_interval
from trimtab.types import BASE_ARM


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer to a question, with its mark."""

    question: Question
    answer: str
    mark: AnswerMark


@dataclass(frozen=True)
class MeasuredArm:
    """Measurements of one seed of an arm on one suite.

    Attributes:
        name: name of the arm, with `#seed` if it has several seeds.
        answers: marked answers to the questions of the suite; may be empty.
        readings: scores of the texts of the suite; may be empty.
    """

    name: str
    answers: Sequence[MarkedAnswer] = ()
    readings: Sequence[TextScore] = ()


@dataclass(frozen=True)
class AnsweringMetrics:
    """Metrics of an arm on the questions of a suite, pooled over seeds.

    Attributes:
        accuracy: mean score of the answers; mean F1 for questions of kind f1.
        change: accuracy minus that of the base arm on the same questions.
        abstained: share of answers that are wrong and make no attempt.
        sets: accuracy by source of the questions.
    """

    accuracy: Rate
    change: Estimate
    abstained: Rate
    sets: Mapping[str, Rate]


@dataclass(frozen=True)
class ReadingMetrics:
    """Metrics of an arm on the texts of a suite, pooled over seeds.

    Attributes:
        perplexity: perplexity per token.
        factor: perplexity divided by that of the base arm on the same texts.
        kl: mean KL(base || arm) per token, in nats.
    """

    perplexity: Estimate
    factor: Estimate
    kl: Estimate


@dataclass(frozen=True)
class UtilityMetrics:
    """Metrics of an arm on one suite.

    Attributes:
        arm: name of the arm.
        seeds: number of seeds.
        answering: metrics on the questions; None if the suite has no questions.
        reads: metrics on the texts; None if the suite has no texts.
    """

    arm: str
    seeds: int
    answering: AnsweringMetrics | None
    reads: ReadingMetrics | None


def mark_answers(question: Question, answer: str) -> MarkedAnswer:
    """Mark an answer by the matching rule of its question, or by `contains` if the question names none."""
    return MarkedAnswer(question, answer, mark_answer(question.kind or "contains", answer, question.answers))


def compute_metrics(measured: Sequence[MeasuredArm]) -> list[UtilityMetrics]:
    """Compute the metrics of every arm of a suite, pooled over seeds (`sta#1` and `sta#2` are seeds of `sta`).

    Args:
        measured: measurements of all seeds of all arms, the base arm among them.

    Returns:
        Metrics of each arm, in the order of its first measurement.

    Raises:
        UsageError: if the base arm is missing, or an arm was measured on different questions or texts.
    """
    base = next((m for m in measured if m.name == BASE_ARM), None)
    if base is None:
        raise UsageError(f"utility is measured against the arm {BASE_ARM!r}, which is missing")
    arms: dict[str, list[MeasuredArm]] = {}
    for m in measured:
        same_questions = [a.question.question for a in m.answers] == [a.question.question for a in base.answers]
        if not same_questions or [r.tokens for r in m.readings] != [r.tokens for r in base.readings]:
            raise UsageError(f"{m.name} was measured on other questions or texts than {base.name}")
        arms.setdefault(get_arm_name(m.name), []).append(m)
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
    scores = _build_table([[a.mark.score for a in seed.answers] for seed in seeds])
    abstained = _build_table([[float(a.mark.abstained) for a in seed.answers] for seed in seeds])
    sources: dict[str, list[int]] = {}
    for i, a in enumerate(base.answers):
        sources.setdefault(a.question.source, []).append(i)
    return AnsweringMetrics(
        accuracy=_compute_rate(scores),
        change=bootstrap_mean(scores - _build_table([[a.mark.score for a in base.answers]])),
        abstained=_compute_rate(abstained),
        sets={source: _compute_rate(scores[:, indices]) for source, indices in sorted(sources.items())},
    )


def _compute_reading(seeds: Sequence[MeasuredArm], base: MeasuredArm) -> ReadingMetrics:
    tokens = torch.tensor([r.tokens for r in base.readings])
    nll = _build_table([[r.nll for r in seed.readings] for seed in seeds])
    return ReadingMetrics(
        perplexity=bootstrap_mean(nll, tokens).map_values(),
        factor=bootstrap_mean(nll - _build_table([[r.nll for r in base.readings]]), tokens).map_values(),
        kl=bootstrap_mean(_build_table([[r.kl for r in seed.readings] for seed in seeds]), tokens),
    )


def _compute_rate(scores: Tensor) -> Rate:
    """Compute the mean of scores [seeds, questions] in [0, 1].

    Wilson's interval is conservative for fractional scores, whose variance is at most that of binary ones."""
    return compute_wilson_interval(scores.sum().item(), scores.shape[1]) if len(scores) == 1 else pigeonhole_bootstrap([scores])


def _build_table(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.double)

"""Scores: numbers that tell right answers from made-up ones without training. One file each, registered by name.

A score is a frozen dataclass of its settings; `one` gives a number from what was collected of an answer, higher where it seems
more truthful. What it must see it says in `needs`, and what that costs in generated tokens follows from them. Other packages
add theirs through the entry-point group `trimtab.scores`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.util.method_registry import MethodRegistry

Need = Literal["trace", "samples", "states", "p_true"]
# How many samples an error tells people to collect; Kuhn et al. 2023 gain little from more.
ENOUGH = 10


@dataclass(frozen=True)
class Generation:
    """One answer as the model gave it: its `text`, the same as `words` that answer judges compare (normalised, one space
    between them), `news`, those of them that the question does not hold, its number of `tokens`, the mean `logp` of these in
    nats, and the last `state` [L, d] at the L layers collected."""

    text: str
    words: str
    news: str
    tokens: int
    logp: float
    state: Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """What was collected of an answer: `trace` [m, 3] (log-prob, entropy, margin of each token, in nats); `samples`, more
    answers to the same question, drawn at a temperature; `p_true`, the probability with which the model calls it true."""

    answer: Generation
    trace: Tensor
    samples: tuple[Generation, ...] = ()
    p_true: float | None = None


@dataclass(frozen=True)
class Score(ABC):
    """What every score is. `similarity` names the way by which those that compare samples do so (similarity.py); the others
    take it for the sake of one form. Of samples a score needs at `least` so many."""

    similarity: str = "exact"

    needs: ClassVar[frozenset[Need]] = frozenset({"trace"})
    least: ClassVar[int] = 1

    @abstractmethod
    def score_answer(self, seen: ScoreInputs) -> float:
        """The score of one answer, of which there is all that `needs` names."""


def list_computable(answers: Sequence[ScoreInputs]) -> list[str]:
    """Names of the scores that can be given to all of these answers."""
    return [name for name in list_scores() if not _missing(name, answers)]


def measure_scores(name: str, answers: Sequence[ScoreInputs], similarity: str = "exact") -> Tensor:
    """Scores [N] of N answers, float64.

    Raises NotFoundError for a name that is not known; UsageError where the answers were collected without what it needs, or a
    score is no number.
    """
    if lacks := _missing(name, answers):
        raise UsageError(f"score {name} needs {lacks}")
    score = get_score(name)(similarity)
    values = [score.score_answer(seen) for seen in answers]
    if bad := [index for index, value in enumerate(values) if not math.isfinite(value)]:
        raise UsageError(f"score {name} gives {values[bad[0]]} for answer {bad[0]} ({answers[bad[0]].answer.text[:40]!r})")
    return torch.tensor(values, dtype=torch.float64)


def compute_token_cost(name: str, answers: Sequence[ScoreInputs]) -> float:
    """Tokens that the model must generate beyond the answer for this score: the mean over N answers."""
    needs = get_score(name).needs
    judged = 1 if "p_true" in needs else 0
    sampled = sum(s.tokens for seen in answers for s in seen.samples) if needs & {"samples", "states"} else 0
    return judged + sampled / max(len(answers), 1)


def _missing(name: str, answers: Sequence[ScoreInputs]) -> str:
    """What a score lacks, and how it is collected; nothing where all is there."""
    score = get_score(name)
    if "p_true" in score.needs and any(seen.p_true is None for seen in answers):
        return "the model's own verdict on each answer: collect with --p_true true"
    fewest = min((len(seen.samples) for seen in answers), default=0)
    if score.needs & {"samples", "states"} and fewest < score.least:
        return f"at least {score.least} samples beside each answer, and there are {fewest}: collect with --samples {ENOUGH}"
    return ""


_known: MethodRegistry[Score] = MethodRegistry("score", __name__, __path__)
register, get_score, list_scores = _known.register, _known.get_method, _known.list_names

"""Scores: training-free measures that rank right answers above made-up ones.

Each score is a frozen dataclass of its settings in its own file, registered by name. `score_answer` returns a number from the
collected data of an answer, higher for answers that seem more truthful. `needs` names the required inputs, which determine the
cost in generated tokens. Other packages add scores through the entry-point group `trimtab.scores`.

In docstrings, [paper] marks elements of the cited paper, and [trimtab] marks deviations from it.
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
# Number of samples that error messages recommend; Kuhn et al. 2023 gain little from more.
ENOUGH = 10


@dataclass(frozen=True)
class Generation:
    """Generated answer.

    Attributes:
        text: text of the answer.
        words: normalized text as answer judges compare it, with words separated by one space.
        news: those of the words that the question does not contain.
        tokens: number of tokens.
        logp: mean log-probability of the tokens, in nats.
        state: last state at each of the L collected layers [L, d].
    """

    text: str
    words: str
    news: str
    tokens: int
    logp: float
    state: Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """Collected data of an answer.

    Attributes:
        answer: the answer.
        trace: log-probability, entropy and margin of each token [m, 3], in nats.
        samples: additional answers to the same question, sampled at a temperature.
        p_true: probability that the model assigns to the answer being true, or None.
    """

    answer: Generation
    trace: Tensor
    samples: tuple[Generation, ...] = ()
    p_true: float | None = None


@dataclass(frozen=True)
class Score(ABC):
    """Base class of scores.

    Attributes:
        similarity: name of the similarity that compares samples (see `trimtab.scores.similarity`); other scores ignore it.
        needs: inputs that the score requires.
        least: minimum number of samples, for scores that need samples.
    """

    similarity: str = "exact"

    needs: ClassVar[frozenset[Need]] = frozenset({"trace"})
    least: ClassVar[int] = 1

    @abstractmethod
    def score_answer(self, inputs: ScoreInputs) -> float:
        """Compute the score of one answer.

        Args:
            inputs: collected data of the answer, with all inputs in `needs`.
        """


def list_computable(answers: Sequence[ScoreInputs]) -> list[str]:
    """List the names of the scores that can be computed for all supplied answers; none without answers."""
    return [name for name in list_scores() if answers and not _find_missing_input(name, answers)]


def measure_scores(name: str, answers: Sequence[ScoreInputs], similarity: str = "exact") -> Tensor:
    """Compute a score for N answers.

    Args:
        name: registered name of the score.
        answers: collected data of the answers.
        similarity: name of the similarity that compares samples, optionally with a threshold.

    Returns:
        Scores [N], float64.

    Raises:
        NotFoundError: if the name is unknown.
        UsageError: if the data lacks an input that the score needs, or a score is not finite.
    """
    if missing := _find_missing_input(name, answers):
        raise UsageError(f"score {name} needs {missing}")
    score = get_score(name)(similarity)
    values = [score.score_answer(inputs) for inputs in answers]
    if bad := [index for index, value in enumerate(values) if not math.isfinite(value)]:
        raise UsageError(f"score {name} gives {values[bad[0]]} for answer {bad[0]} ({answers[bad[0]].answer.text[:40]!r})")
    return torch.tensor(values, dtype=torch.float64)


def compute_token_cost(name: str, answers: Sequence[ScoreInputs]) -> float:
    """Compute the mean number of tokens that a score generates per answer, in addition to the answer.

    Args:
        name: registered name of the score.
        answers: collected data of the answers.
    """
    needs = get_score(name).needs
    verdict_tokens = 1 if "p_true" in needs else 0
    sampled_tokens = sum(s.tokens for inputs in answers for s in inputs.samples) if needs & {"samples", "states"} else 0
    return verdict_tokens + sampled_tokens / max(len(answers), 1)


def _find_missing_input(name: str, answers: Sequence[ScoreInputs]) -> str:
    """Describe the input that a score lacks and how to collect it; empty if all inputs exist."""
    score = get_score(name)
    if "p_true" in score.needs and any(inputs.p_true is None for inputs in answers):
        return "the model's verdict on each answer: collect with --p_true true"
    fewest = min((len(inputs.samples) for inputs in answers), default=0)
    if score.needs & {"samples", "states"} and fewest < score.least:
        return f"at least {score.least} samples for each answer, but there are {fewest}: collect with --num_samples {ENOUGH}"
    return ""


_registry: MethodRegistry[Score] = MethodRegistry("score", __name__, __path__)
register, get_score, list_scores = _registry.register, _registry.get_method, _registry.list_names

"""Asking a model: the types that evaluation and jobs share with the engine, without the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.artifacts.prefix import Prefix
from trimtab.model.chat_template import Message

Progress = Callable[[int, int], None]
"""Called with (answers done, answers in all)."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: at most `max_tokens` tokens, greedy at temperature 0, `n` answers each. `logprobs` asks for so
    many of the likeliest tokens at each step beside the one drawn."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """One conversation to answer, with a prefix or without."""

    messages: Sequence[Message]
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Signals:
    """What the model showed while it wrote an answer of m tokens (see signals.py): `psi` [L, 3d] of the captured layers, and
    `history` [m, 3]: log-prob, entropy and margin of each token; float32."""

    psi: Tensor
    history: Tensor


@dataclass(frozen=True)
class Answer:
    """One answer. `finished` is `stop` where the model ended it, `length` where `max_tokens` did; `logprobs` holds, for
    each token of the answer where they were asked for, natural log-probabilities by token id: its own and the likeliest.
    `signals` are there where the engine captures them, `risk` where a detector was given."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[Mapping[int, float], ...] = ()
    signals: Signals | None = None
    risk: float | None = None

    @property
    def mean_log_probability(self) -> float:
        """Mean log-probability of its tokens, where log-probabilities were asked for; minus infinity for an empty answer."""
        own = [step[token] for step, token in zip(self.logprobs, self.token_ids, strict=True)]
        return sum(own) / len(own) if own else float("-inf")

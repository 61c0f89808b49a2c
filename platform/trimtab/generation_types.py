"""Types for text generation, shared by the engine, evaluation and jobs without importing the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.artifacts.prefix import Prefix
from trimtab.model.chat_template import Message

Progress = Callable[[int, int], None]
"""Callback with the number of finished answers and the total number of answers."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        max_tokens: maximum number of tokens of an answer.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: probability mass of the tokens to sample from.
        n: number of answers for each conversation.
        seed: seed of the sampler, or None.
        repetition_penalty: factor that penalizes repeated tokens; 1 is no penalty.
        logprobs: number of most likely tokens to report at each step besides the sampled one, or None for no log-probabilities.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Conversation to answer, with an optional prefix.

    Attributes:
        messages: messages of the conversation.
        prefix: prefix that steers the answer.
        answer_start: opening that the answer continues.
    """

    messages: Sequence[Message]
    prefix: Prefix | None = None
    answer_start: str = ""


@dataclass(frozen=True)
class Signals:
    """Signals that a base model emits while it generates an answer of m tokens (see `trimtab.detection.signals`).

    Attributes:
        psi: features of the captured layers [L, 3d], float32.
        history: log-probability, entropy and margin of each token [m, 3], float32.
        prompt_risks: risks of the request's prompt checks, in their order; NaN if a risk could not be computed.
        windows: mean states of the windows of the prompt [W, L, d], float32; empty for a prompt of one window, and if they were
            not recorded.
        running: features of the unfinished answer at every `CHECK_INTERVAL` tokens [K, L, 3d], float16; empty if they were not
            recorded.
        prompt: features of the prompt [L, 3d], float32; empty if they were not stored.
    """

    psi: Tensor
    history: Tensor
    prompt_risks: tuple[float, ...] = ()
    windows: Tensor = field(default_factory=lambda: torch.empty(0))
    running: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float16))
    prompt: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Answer:
    """Generated answer.

    Attributes:
        text: decoded text.
        token_ids: token ids of the answer.
        finish_reason: `stop` if the model ended the answer, `length` if it reached `max_tokens`.
        prompt_tokens: number of prompt tokens.
        logprobs: natural log-probabilities by token id for each token of the answer: that token and the most likely ones. Empty
            if they were not requested.
        signals: captured signals, or None if the engine does not capture them.
        risk: risk that the answer is made up, or None without a detector.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[Mapping[int, float], ...] = ()
    signals: Signals | None = None
    risk: float | None = None

    @property
    def mean_log_probability(self) -> float:
        """Mean log-probability of the answer's tokens, which needs `logprobs`; minus infinity for an empty answer."""
        values = [step[token] for step, token in zip(self.logprobs, self.token_ids, strict=True)]
        return sum(values) / len(values) if values else float("-inf")

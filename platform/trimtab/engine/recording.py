"""Signals of prompts and answers that a server stores, to train detectors on live traffic, without text and token ids."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trimtab.generation_types import Signals
from trimtab.types import Subject


@dataclass(frozen=True)
class AnswerSignals:
    """Signals of one answer.

    Attributes:
        signals: signals of the answer.
        tokens: number of tokens of the answer.
        finished: whether the model ended the answer, instead of a limit or a policy.
    """

    signals: Signals
    tokens: int
    finished: bool


@dataclass(frozen=True)
class PromptSignals:
    """Signals of the prompt of a request.

    Attributes:
        psi: features of the captured layers [L, 3d], float32.
        windows: mean states of the windows of the prompt [W, L, d], float32; empty for a prompt of one window.
        prefix_digest: digest of the prefix under which the model read the prompt; None without a prefix.
        detector: first detector of prompts that checked it, as NAME@VERSION; None without a check.
        risk: risk by this detector; None if it is unknown.
    """

    psi: Tensor
    windows: Tensor
    prefix_digest: str | None
    detector: str | None
    risk: float | None


@dataclass(frozen=True)
class RecordedPrompt:
    """Prompt of a request, as the server stores it.

    Attributes:
        request_id: request id of the server.
        key: name of the API key that sent the request; None without keys.
        model: base model, or base model, prefix and version of the answer.
        prompt: signals of the prompt.
    """

    request_id: str
    key: str | None
    model: str
    prompt: PromptSignals


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer of a request, as the server stores it.

    Attributes:
        request_id: request id of the server.
        choice: index of the answer in the response.
        key: name of the API key that sent the request; None without keys.
        model: base model, or base model, prefix and version.
        prefix_digest: digest of the prefix; None without a prefix.
        detector: detector of the answer as NAME@VERSION; None without a detector.
        risk: risk of the answer; None if it is unknown.
        answer: signals of the answer.
    """

    request_id: str
    choice: int
    key: str | None
    model: str
    prefix_digest: str | None
    detector: str | None
    risk: float | None
    answer: AnswerSignals


class SignalSink(Protocol):
    """Protocol of a sink that stores a sample of the prompts and answers without blocking."""

    @property
    def subjects(self) -> Collection[Subject]:
        """Whether prompts, answers or both are stored."""
        ...

    def is_sampled(self, request_id: str) -> bool:
        """Return whether the prompt and the answers of a request are stored."""
        ...

    def __call__(self, recorded: RecordedAnswer | RecordedPrompt) -> None:
        """Store a prompt or an answer, or drop it."""
        ...

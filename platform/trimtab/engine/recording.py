"""Signals of answers that a server stores, to train detectors on live traffic. They contain neither text nor token ids."""

from dataclasses import dataclass
from typing import Protocol

from trimtab.generation_types import Signals


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


class AnswerSink(Protocol):
    """Protocol of a sink that stores a sample of the answers without blocking."""

    def is_sampled(self, request_id: str) -> bool:
        """Return whether the answers to a request are stored."""
        ...

    def __call__(self, answer: RecordedAnswer) -> None:
        """Store an answer, or drop it."""
        ...

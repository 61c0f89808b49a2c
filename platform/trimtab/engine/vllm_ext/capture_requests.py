"""Requests whose signals the engine's worker captures: their state while they run, and their record at the end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.detection.signals import RECENT, SignalAccumulator
from trimtab.engine.prompt_check import UNTRACKED, PromptCheck, decode_checks
from trimtab.engine.vllm_ext.args import GIVEN_ANSWER_START


@dataclass
class RunningRequest:
    """Running request.

    Attributes:
        slot: slot in the accumulator.
        prompt: number of prompt tokens.
        given: token ids of a given answer after the prompt; None if the engine generates the answer. Tokens that the engine
            generates after a given answer are ignored.
        checks: checks of the prompt, which are applied when its last token is read.
        is_tracked: whether the signals of the answer are captured.
        read: number of prompt tokens processed.
        written: number of answer tokens processed.
    """

    slot: int
    prompt: int
    given: list[int] | None = None
    checks: tuple[PromptCheck, ...] = ()
    is_tracked: bool = True
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class RequestSpan:
    """Tokens of one request in a step.

    Attributes:
        index: index of the request in the batch.
        running: the request.
        first: row of the first token in the tensors of the step.
        start: position of the first token in the request.
        count: number of tokens.
    """

    index: int
    running: RunningRequest
    first: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.count

    def select_rows(self, start: int, end: int) -> range:
        """Return the rows of the tokens whose position is at least `start` and less than `end`."""
        offset = self.first - self.start
        return range(max(start, self.start) + offset, min(end, self.end) + offset)


@dataclass(frozen=True)
class PendingSamples:
    """Requests whose next token is being sampled.

    Attributes:
        lines: indices in the batch [n].
        slots: slots in the accumulator [n].
        states: hidden states [n, L, d].
        logp: log-probabilities [n, V].
    """

    lines: Tensor
    slots: Tensor
    states: Tensor
    logp: Tensor


@dataclass(frozen=True)
class PendingVerdicts:
    """Requests whose prompt was checked, and whose first token is being sampled.

    Attributes:
        lines: indices in the batch [n].
        stopped: whether the verdict token replaces the sampled one, so that the request ends [n].
    """

    lines: Tensor
    stopped: Tensor


@dataclass(frozen=True)
class EndedRequest:
    """Signals of a request on the host.

    Attributes:
        held: accumulator with the request's slot only.
        history: log-probability, entropy and margin of each token [m, 3]; None without a history.
        prompt_risks: risks of the prompt's checks; NaN for unknown ones.
    """

    held: SignalAccumulator
    history: Tensor | None
    prompt_risks: list[float]


def start_request(slot: int, new: Any) -> RunningRequest:
    """Return a request that starts in a slot of the accumulator.

    Args:
        slot: the slot.
        new: vLLM's data of a scheduled request.
    """
    ids: list[int] = list(new.prompt_token_ids or ())
    extra_args = _get_extra_args(new)
    if (start := extra_args.get(GIVEN_ANSWER_START)) is not None:
        return RunningRequest(slot, start, ids[start:])
    return RunningRequest(slot, len(ids), checks=decode_checks(extra_args), is_tracked=not extra_args.get(UNTRACKED))


def requires_check(new: Any) -> bool:
    """Return whether a request must not be answered unless its prompt is checked."""
    return any(check.stops and check.required for check in decode_checks(_get_extra_args(new)))


def _get_extra_args(new: Any) -> dict[str, Any]:
    return (new.sampling_params and new.sampling_params.extra_args) or {}


def build_record(ended: EndedRequest | None, tokens: int) -> dict[str, Any] | None:
    """Build the record of a request at its first `tokens` answer tokens; with 0 tokens it has prompt risks only."""
    if ended is None:
        return None
    if tokens < 1:
        return {"psi": b"", "history": b"", "prompt_risks": ended.prompt_risks} if ended.prompt_risks else None
    excess = int(ended.held.tokens[0]) - tokens
    if not 0 <= excess < RECENT:
        return None
    held = ended.held if excess == 0 else ended.held.taken(0)
    held.take_back(0, excess)
    slot = torch.zeros(1, dtype=torch.long)
    return {
        "psi": held.geometry(slot)[0].numpy().tobytes(),
        "history": ended.history[:tokens].numpy().tobytes() if ended.history is not None else b"",
        "prompt_risks": ended.prompt_risks,
    }

"""Requests whose signals the engine's worker captures: their state while they run, and their record at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.detection.signals import CHECK_INTERVAL, RECENT, SignalAccumulator
from trimtab.engine.checks import PROMPT_STORED, RECORDED, UNTRACKED, RequestChecks, decode_checks
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START


@dataclass
class RunningRequest:
    """Running request.

    Attributes:
        slot: slot in the accumulator.
        prompt: number of prompt tokens.
        supplied: token ids of a supplied answer after the prompt; None if the engine generates the answer. Tokens that the
            engine generates after a supplied answer are ignored.
        checks: checks of the prompt, which are applied when its last token is read, and of the answer.
        is_tracked: whether the signals of the answer are captured.
        is_recorded: whether the signals of the unfinished answer and the windows of the prompt are stored.
        stores_prompt: whether the features of the prompt and its windows are stored.
        read: number of prompt tokens processed.
        written: number of answer tokens processed.
        windows: mean states of the windows of the prompt [W, L, d]; None before they are needed.
        running: psi of the unfinished answer [L, 3d] at every `CHECK_INTERVAL` tokens, float16.
        prompt_psi: features of the prompt [L, 3d]; None before its last token is read, and if they are not stored.
    """

    slot: int
    prompt: int
    supplied: list[int] | None = None
    checks: RequestChecks = field(default_factory=RequestChecks)
    is_tracked: bool = True
    is_recorded: bool = False
    stores_prompt: bool = False
    read: int = 0
    written: int = 0
    windows: Tensor | None = None
    running: list[Tensor] = field(default_factory=list[Tensor])
    prompt_psi: Tensor | None = None

    @property
    def needs_prompt_psi(self) -> bool:
        """Whether the features of the prompt are needed when its last token is read."""
        return bool(self.checks.prompt) or self.stores_prompt

    @property
    def needs_running_psi(self) -> bool:
        """Whether psi of the answer so far is needed at its current token."""
        return self.written % CHECK_INTERVAL == 0 and bool(self.checks.answer or self.is_recorded)


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
        logp: log-probabilities [n, V]; None without a history.
    """

    lines: Tensor
    slots: Tensor
    states: Tensor
    logp: Tensor | None


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
        accumulator: accumulator with the request's slot only.
        history: log-probability, entropy and margin of each token [m, 3]; None without a history.
        prompt_risks: risks of the prompt's checks; NaN for unknown ones.
        windows: mean states of the windows of the prompt [W, L, d]; None if they were not stored.
        running: psi of the unfinished answer [K, L, 3d], float16; None if it was not stored.
        prompt: features of the prompt [L, 3d]; None if they were not stored.
    """

    accumulator: SignalAccumulator
    history: Tensor | None
    prompt_risks: list[float]
    windows: Tensor | None = None
    running: Tensor | None = None
    prompt: Tensor | None = None


def start_request(slot: int, new: Any) -> RunningRequest:
    """Return a request that starts in a slot of the accumulator.

    Args:
        slot: the slot.
        new: vLLM's data of a scheduled request.
    """
    ids: list[int] = list(new.prompt_token_ids or ())
    extra_args = _get_extra_args(new)
    if (start := extra_args.get(SUPPLIED_ANSWER_START)) is not None:
        return RunningRequest(slot, start, ids[start:], is_recorded=bool(extra_args.get(RECORDED)))
    tracked, recorded, stored = (bool(extra_args.get(name)) for name in (UNTRACKED, RECORDED, PROMPT_STORED))
    return RunningRequest(slot, len(ids), None, decode_checks(extra_args), not tracked, recorded, stored)


def requires_check(new: Any) -> bool:
    """Return whether a request must not be answered unless it is checked."""
    return decode_checks(_get_extra_args(new)).is_required


def _get_extra_args(new: Any) -> dict[str, Any]:
    return (new.sampling_params and new.sampling_params.extra_args) or {}


def build_record(ended: EndedRequest | None, tokens: int) -> dict[str, Any] | None:
    """Build the record of a request at its first `tokens` answer tokens; with 0 tokens it is about the prompt only."""
    if ended is None:
        return None
    prompt = {"windows": ended.windows, "prompt": ended.prompt}
    if tokens < 1:
        is_empty = not ended.prompt_risks and ended.prompt is None
        return None if is_empty else _encode(prompt) | {"psi": b"", "prompt_risks": ended.prompt_risks}
    excess = int(ended.accumulator.tokens[0]) - tokens
    if not 0 <= excess < RECENT:
        return None
    accumulator = ended.accumulator if excess == 0 else ended.accumulator.taken(0)
    accumulator.take_back(0, excess)
    slot = torch.zeros(1, dtype=torch.long)
    tensors = {
        "psi": accumulator.geometry(slot)[0],
        "history": None if ended.history is None else ended.history[:tokens],
        "running": None if ended.running is None else ended.running[: tokens // CHECK_INTERVAL],
    }
    return _encode(tensors | prompt) | {"prompt_risks": ended.prompt_risks}


def _encode(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if tensor is not None}

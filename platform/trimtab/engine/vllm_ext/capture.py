"""Capture of signals inside the engine's worker while requests run.

After each forward pass, the hidden states of the captured layers are added to the accumulator slots of their requests, on the
device. After sampling, the statistics of the sampled tokens are added. The capture uses only values that vLLM computes anyway,
and copies nothing to the host before the signals of a request are fetched or the request ends.

Prompt means need the states of all prompt tokens, but tokens in the prefix cache are not computed again. Therefore each block
of the KV cache has a sum of its tokens' states. Block and sum are written together from the block's first token on, so that the
sum is valid as long as the block. Requests share only full blocks. The tokens after the last full block of a prompt belong to
one request.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from trimtab.detection.signals import (
    RECENT,
    SignalAccumulator,
    TokenStatistics,
    compute_token_statistics,
    gather_token_statistics,
)
from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import GIVEN_ANSWER_START

# Length of the suffix that vLLM appends to the id of a request: a hyphen and eight characters.
SUFFIX = 9
# Number of positions whose logits are computed at once.
PIECE = 256


@dataclass
class RunningRequest:
    """Running request.

    Attributes:
        slot: slot in the accumulator.
        prompt: number of prompt tokens.
        given: token ids of a given answer after the prompt; None if the engine generates the answer. Tokens that the engine
            generates after a given answer are ignored.
        read: number of prompt tokens processed.
        written: number of answer tokens accumulated.
    """

    slot: int
    prompt: int
    given: list[int] | None = None
    read: int = 0
    written: int = 0


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
class EndedRequest:
    """Signals of a request on the host.

    Attributes:
        held: accumulator with the request's slot only.
        history: log-probability, entropy and margin of each token [m, 3]; None without a history.
    """

    held: SignalAccumulator
    history: Tensor | None


class SignalCapture:
    """Accumulator of the signals of a vLLM model runner.

    Args:
        runner: vLLM's model runner.
        layers: number of captured layers.
        history: whether to store log-probability, entropy and margin of each token. A detector with any tau_l computes its phi
            from these.
        keep: maximum number of ended requests whose signals are kept until they are fetched.
    """

    def __init__(self, runner: Any, layers: int, history: bool, keep: int) -> None:
        self.runner = runner
        self.layers = layers
        # Preempted requests keep their slots, in addition to the running ones.
        self.free = list(range(2 * runner.max_num_reqs))
        width = runner.model_config.get_hidden_size()
        self.sums = SignalAccumulator(len(self.free), layers, width, device=runner.device)
        shape = (len(self.free), runner.max_model_len, 3) if history else (0, 0, 3)
        self.history = torch.zeros(shape, device=runner.device)
        self.running: dict[str, RunningRequest] = {}
        self.ended: OrderedDict[str, EndedRequest] = OrderedDict()
        self.keep = keep
        self.pending: PendingSamples | None = None
        self.table = runner.input_batch.block_table[find_full_attention_group(runner.kv_cache_config)]
        blocks = runner.kv_cache_config.num_blocks * self.table.blocks_per_kv_block
        self.block_sums = torch.zeros(blocks, layers, width, device=runner.device)
        patches.patch_sampling(runner, self._wrap_sample)

    def begin_step(self, scheduled: Any) -> None:
        """Release the slots of finished requests, and assign slots to new ones. Called before a step.

        Args:
            scheduled: vLLM's scheduler output.
        """
        for request in scheduled.finished_req_ids:
            self.end_request(request)
        fresh = scheduled.scheduled_new_reqs[: len(self.free)]
        for new in fresh:
            self.running[new.req_id] = _start_request(self.free.pop(), new)
        if fresh:
            self.sums.clear(self._as_indices([self.running[new.req_id].slot for new in fresh]))

    def end_request(self, request: str) -> None:
        """Copy the signals of a request to the host, and free its slot."""
        if (running := self.running.pop(request, None)) is None:
            return
        if running.written:
            self.ended[request] = EndedRequest(self.sums.taken(running.slot), self._copy_history(running))
        self.free.append(running.slot)
        while len(self.ended) > self.keep:
            self.ended.popitem(last=False)

    def pop_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """Return the signals of a request, and discard the request.

        Args:
            request: id of the request, either the engine's or the client's.
            tokens: number of answer tokens to include.

        Returns:
            Record of the signals. None if the request is unknown or discarded, has no answer, or has more tokens after its stop
            than the accumulator can take back.
        """
        matches = self._find_requests(request)
        for name in matches:
            self.end_request(name)
        return _build_record(self.ended.pop(matches[-1], None) if matches else None, tokens)

    def peek_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """Return the signals of a request at its first `tokens` answer tokens, and keep the request.

        Arguments and result as in `pop_signals`.
        """
        matches = self._find_requests(request)
        if not matches or (running := self.running.get(matches[-1])) is None:
            return _build_record(self.ended.get(matches[-1]) if matches else None, tokens)
        return _build_record(EndedRequest(self.sums.taken(running.slot), self._copy_history(running)), tokens)

    def _find_requests(self, request: str) -> list[str]:
        """Return the engine ids of a request: vLLM appends a random suffix to the ids of clients."""
        return [name for name in (*self.ended, *self.running) if name == request or name[:-SUFFIX] == request]

    def _copy_history(self, running: RunningRequest) -> Tensor | None:
        return self.history[running.slot, : running.written].to("cpu", copy=True) if len(self.history) else None

    def accumulate_step(self) -> None:
        """Accumulate the states of a step. Called after the forward pass and before sampling."""
        state, batch = self.runner.execute_model_state, self.runner.input_batch
        counts = [state.scheduler_output.num_scheduled_tokens[request] for request in batch.req_ids]
        starts = batch.num_computed_tokens_cpu[: len(counts)]
        line = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        position = np.arange(len(line)) - np.repeat(first, counts) + np.repeat(starts, counts)
        rows = torch.stack([layer[: len(line)] for layer in state.aux_hidden_states], 1).float()
        self._add_to_blocks(line, position, rows)
        self._add_prompt_tails(batch.req_ids, line, position, rows)
        self._write_given_answers(batch.req_ids, line, position, rows, state.hidden_states)
        self._prepare_samples(batch.req_ids, first + np.asarray(counts) - 1, position, rows, state.logits)

    def _wrap_sample(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the runner's `_sample` to add the sampled tokens to the accumulator."""

        def sample_and_write(*args: Any, **options: Any) -> Any:
            output = sample(*args, **options)
            if (pending := self.pending) is not None:
                self.pending = None
                tokens = output.sampled_token_ids[pending.lines, 0].long()
                self._write_tokens(pending.slots, pending.states, gather_token_statistics(pending.logp, tokens))
            return output

        return sample_and_write

    def _write_tokens(self, slots: Tensor, states: Tensor, reading: TokenStatistics) -> None:
        if len(self.history):
            positions = self.sums.tokens[slots]
            self.history[slots, positions] = torch.stack([reading.logp, reading.entropy, reading.margin], 1)
        self.sums.write(slots, states, reading)

    def _add_to_blocks(self, line: Any, position: Any, rows: Tensor) -> None:
        table = self.table.get_numpy_array()
        block = self._as_indices(table[line, position // self.table.block_size])
        self.block_sums[block[self._as_indices(position % self.table.block_size) == 0]] = 0
        self.block_sums.index_add_(0, block, rows)

    def _add_prompt_tails(self, requests: list[str], line: Any, position: Any, rows: Tensor) -> None:
        """Add the prompt tokens after the last full block.

        Each token is added once, although a preempted request computes its tokens again. A request with a given answer does not
        read the prefix cache, so that all its prompt tokens are added here.
        """
        selected: list[int] = []
        slots: list[int] = []
        for index, request in enumerate(requests):
            if (running := self.running.get(request)) is None:
                continue
            indices = np.flatnonzero(line == index)
            tail = 0 if running.given is not None else running.prompt - running.prompt % self.table.block_size
            added = indices[(position[indices] >= max(tail, running.read)) & (position[indices] < running.prompt)]
            if len(indices):
                running.read = max(running.read, min(running.prompt, int(position[indices[-1]]) + 1))
            selected += added.tolist()
            slots += [running.slot] * len(added)
        if selected:
            self.sums.read(self._as_indices(slots), rows[self._as_indices(selected)])

    def _write_given_answers(self, requests: list[str], line: Any, position: Any, rows: Tensor, hidden: Tensor) -> None:
        """Add the tokens of given answers whose states this step computed.

        The accumulator takes at most one token per request and call. Thus the n-th tokens of all requests are written together.
        """
        entries: list[tuple[int, int, int, int]] = []
        for index, request in enumerate(requests):
            running = self.running.get(request)
            if running is None or running.given is None:
                continue
            number = position - (running.prompt - 1)
            indices = np.flatnonzero((line == index) & (number >= running.written) & (number < len(running.given)))
            entries += [(turn, i, running.slot, running.given[int(number[i])]) for turn, i in enumerate(indices.tolist())]
            running.written += len(indices)
        if not entries:
            return
        turns, selected, slots, tokens = self._as_indices(sorted(entries)).T
        pieces = zip(selected.split(PIECE), tokens.split(PIECE), strict=True)
        statistics = [compute_token_statistics(self.runner.model.compute_logits(hidden[piece]), ids) for piece, ids in pieces]
        logp, entropy, margin = (torch.cat([getattr(s, name) for s in statistics]) for name in ("logp", "entropy", "margin"))
        sizes = turns.bincount().tolist()
        parts = (values.split(sizes) for values in (slots, rows[selected], logp, entropy, margin))
        for slot, states, *values in zip(*parts, strict=True):
            self._write_tokens(slot, states, TokenStatistics(*values))

    def _prepare_samples(self, requests: list[str], last: Any, position: Any, rows: Tensor, logits: Tensor) -> None:
        """Set `pending` to the requests that sample a new token, except those in mid-prompt or recomputing after preemption."""
        size = self.table.block_size
        lines: list[int] = []
        for index, request in enumerate(requests):
            running = self.running.get(request)
            if running is None or running.given is not None or self.runner.discard_request_mask.np[index]:
                continue
            if position[last[index]] != running.prompt - 1 + running.written:
                continue
            if running.written == 0 and (full := running.prompt // size):
                blocks = self._as_indices(self.table.get_numpy_array()[index, :full])
                slot = self._as_indices([running.slot])
                self.sums.read_sum(slot, self.block_sums[blocks].sum(0, keepdim=True), self._as_indices([full * size]))
            running.written += 1
            lines.append(index)
        if lines:
            selected = self._as_indices(lines)
            slots = self._as_indices([self.running[requests[index]].slot for index in lines])
            states = rows[self._as_indices(last[lines])]
            self.pending = PendingSamples(selected, slots, states, logits[selected].float().log_softmax(-1))

    def _as_indices(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.runner.device).long()


def find_full_attention_group(cache: KVCacheConfig) -> int:
    """Find the first group of full-attention layers, which keep the KV blocks of the complete prompt.

    Args:
        cache: vLLM's configuration of the KV cache.

    Returns:
        Index of the group.

    Raises:
        ValueError: if there is none, for example if all layers use sliding windows.
    """
    for index, group in enumerate(cache.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec, FullAttentionSpec):
            return index
    raise ValueError("no layer of this model keeps the complete prompt in the KV cache. Detectors do not support this model")


def _start_request(slot: int, new: Any) -> RunningRequest:
    ids: list[int] = list(new.prompt_token_ids or ())
    start: int | None = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(GIVEN_ANSWER_START)
    return RunningRequest(slot, len(ids)) if start is None else RunningRequest(slot, start, ids[start:])


def _build_record(ended: EndedRequest | None, tokens: int) -> dict[str, Any] | None:
    """Build the record of a request at its first `tokens` answer tokens."""
    if ended is None or tokens < 1:
        return None
    excess = int(ended.held.tokens[0]) - tokens
    if not 0 <= excess < RECENT:
        return None
    held = ended.held if excess == 0 else ended.held.taken(0)
    held.take_back(0, excess)
    slot = torch.zeros(1, dtype=torch.long)
    return {
        "psi": held.geometry(slot)[0].numpy().tobytes(),
        "history": ended.history[:tokens].numpy().tobytes() if ended.history is not None else b"",
        "prompt_tokens": int(held.prompt_tokens[0]),
    }

"""Signals inside the engine's worker: what the model shows is folded into one accumulator while requests run.

After each forward pass the rows of the tapped layers are added to the requests they belong to, on the device; when tokens have
been sampled their log-probabilities are. Nothing is asked of vLLM that it does not compute anyway, and nothing is copied to the
host before a request ends.

Prompt means need every prompt token, and tokens that come from the prefix cache are not computed again. So each block of the
KV cache has the sum of its tokens' states beside it: it is valid exactly as long as the block is, as both are written together
from the block's first token on. Only whole blocks are ever shared; the tokens after a prompt's last whole block are its own.
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

# Length of what vLLM adds to the id of a request.
SUFFIX = 9
# Positions whose logits are computed at once.
PIECE = 256


@dataclass
class RunningRequest:
    """A request in the accumulator's `slot`: tokens of its prompt, how many of them were read, and the tokens written.
    `given` is the answer that follows its prompt where someone else wrote it; none of the engine's own tokens count then."""

    slot: int
    prompt: int
    given: list[int] | None = None
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class PendingSamples:
    """Requests whose next token is being sampled: their lines in the batch, slots, states [n, L, d] and log-probs [n, V]."""

    lines: Tensor
    slots: Tensor
    states: Tensor
    logp: Tensor


@dataclass(frozen=True)
class EndedRequest:
    """What is kept of a request after its end, on the host: its slot's contents, and [m, 3] log-prob, entropy and margin of
    each token where the capture keeps a history."""

    held: SignalAccumulator
    history: Tensor | None


class SignalCapture:
    """Folds a vLLM model runner's steps. `layers` are tapped; `history` keeps three numbers for each token, of which any
    detector's phi is made, whatever its tau_l; the latest `keep` requests are remembered after their end until they are asked
    for."""

    def __init__(self, runner: Any, layers: int, history: bool, keep: int) -> None:
        self.runner = runner
        self.layers = layers
        # Requests that were preempted wait with what they have, beside those that run.
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
        """Before a step: let go of requests that ended, and make room for new ones."""
        for request in scheduled.finished_req_ids:
            self.end_request(request)
        fresh = scheduled.scheduled_new_reqs[: len(self.free)]
        for new in fresh:
            self.running[new.req_id] = _start_request(self.free.pop(), new)
        if fresh:
            self.sums.clear(self._as_indices([self.running[new.req_id].slot for new in fresh]))

    def end_request(self, request: str) -> None:
        """Move a request to the host and free its slot."""
        if (now := self.running.pop(request, None)) is None:
            return
        if now.written:
            self.ended[request] = EndedRequest(self.sums.taken(now.slot), self._copy_history(now))
        self.free.append(now.slot)
        while len(self.ended) > self.keep:
            self.ended.popitem(last=False)

    def pop_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """Return the signals of a request by its id, the engine's or its client's, and forget the request.

        None if the request is unknown: forgotten, without an answer, or written further past its stop than can be taken back.
        """
        own = self._find_requests(request)
        for known in own:
            self.end_request(known)
        return _build_record(self.ended.pop(own[-1], None) if own else None, tokens)

    def peek_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """The same of a request that goes on, as it was when it had so many tokens."""
        own = self._find_requests(request)
        if not own or (now := self.running.get(own[-1])) is None:
            return _build_record(self.ended.get(own[-1]) if own else None, tokens)
        return _build_record(EndedRequest(self.sums.taken(now.slot), self._copy_history(now)), tokens)

    def _find_requests(self, request: str) -> list[str]:
        """Ids under which the engine has a request: vLLM adds eight random characters to those of clients."""
        return [known for known in (*self.ended, *self.running) if known == request or known[:-SUFFIX] == request]

    def _copy_history(self, now: RunningRequest) -> Tensor | None:
        return self.history[now.slot, : now.written].to("cpu", copy=True) if len(self.history) else None

    def accumulate_step(self) -> None:
        """After the forward pass, before sampling."""
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
        """Return the runner's `_sample`, followed by writing the tokens that it returned."""

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
            at = self.sums.tokens[slots]
            self.history[slots, at] = torch.stack([reading.logp, reading.entropy, reading.margin], 1)
        self.sums.write(slots, states, reading)

    def _add_to_blocks(self, line: Any, position: Any, rows: Tensor) -> None:
        table = self.table.get_numpy_array()
        block = self._as_indices(table[line, position // self.table.block_size])
        self.block_sums[block[self._as_indices(position % self.table.block_size) == 0]] = 0
        self.block_sums.index_add_(0, block, rows)

    def _add_prompt_tails(self, requests: list[str], line: Any, position: Any, rows: Tensor) -> None:
        """Add prompt tokens after the last whole block, each once: a request that was preempted computes them again. Of one
        that brings its answer, which reads nothing from the cache, all of them."""
        chosen: list[int] = []
        slots: list[int] = []
        for index, request in enumerate(requests):
            if (now := self.running.get(request)) is None:
                continue
            own = np.flatnonzero(line == index)
            tail = 0 if now.given is not None else now.prompt - now.prompt % self.table.block_size
            mine = own[(position[own] >= max(tail, now.read)) & (position[own] < now.prompt)]
            now.read = max(now.read, min(now.prompt, int(position[own[-1]]) + 1)) if len(own) else now.read
            chosen += mine.tolist()
            slots += [now.slot] * len(mine)
        if chosen:
            self.sums.read(self._as_indices(slots), rows[self._as_indices(chosen)])

    def _write_given_answers(self, requests: list[str], line: Any, position: Any, rows: Tensor, hidden: Tensor) -> None:
        """Fold in the tokens of given answers that this step has states for: of each request the first, then the second, …"""
        found: list[tuple[int, int, int, int]] = []
        for index, request in enumerate(requests):
            now = self.running.get(request)
            if now is None or now.given is None:
                continue
            number = position - (now.prompt - 1)
            own = np.flatnonzero((line == index) & (number >= now.written) & (number < len(now.given)))
            found += [(turn, at, now.slot, now.given[int(number[at])]) for turn, at in enumerate(own.tolist())]
            now.written += len(own)
        if not found:
            return
        turns, at, slots, tokens = self._as_indices(sorted(found)).T
        pieces = zip(at.split(PIECE), tokens.split(PIECE), strict=True)
        read = [compute_token_statistics(self.runner.model.compute_logits(hidden[piece]), ids) for piece, ids in pieces]
        logp, entropy, margin = (torch.cat([getattr(r, name) for r in read]) for name in ("logp", "entropy", "margin"))
        sizes = turns.bincount().tolist()
        parts = (values.split(sizes) for values in (slots, rows[at], logp, entropy, margin))
        for slot, states, *figures in zip(*parts, strict=True):
            self._write_tokens(slot, states, TokenStatistics(*figures))

    def _prepare_samples(self, requests: list[str], last: Any, position: Any, rows: Tensor, logits: Tensor) -> None:
        """Requests that reached their next new token: not those in the middle of a prompt, or of a second way through."""
        size = self.table.block_size
        lines: list[int] = []
        for index, request in enumerate(requests):
            now = self.running.get(request)
            if now is None or now.given is not None or self.runner.discard_request_mask.np[index]:
                continue
            if position[last[index]] != now.prompt - 1 + now.written:
                continue
            if now.written == 0 and (whole := now.prompt // size):
                blocks = self._as_indices(self.table.get_numpy_array()[index, :whole])
                one = self._as_indices([now.slot])
                self.sums.read_sum(one, self.block_sums[blocks].sum(0, keepdim=True), self._as_indices([whole * size]))
            now.written += 1
            lines.append(index)
        if lines:
            chosen = self._as_indices(lines)
            slots = self._as_indices([self.running[requests[index]].slot for index in lines])
            states = rows[self._as_indices(last[lines])]
            self.pending = PendingSamples(chosen, slots, states, logits[chosen].float().log_softmax(-1))

    def _as_indices(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.runner.device).long()


def find_full_attention_group(cache: KVCacheConfig) -> int:
    """The number of the first group of layers whose KV blocks are kept for a whole prompt: sums may stand beside those only.
    Raises ValueError for a model that has none, as where every layer sees a window."""
    for number, group in enumerate(cache.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec, FullAttentionSpec):
            return number
    raise ValueError("no layer of this model keeps its whole prompt in vLLM's cache; detectors cannot read it")


def _start_request(slot: int, new: Any) -> RunningRequest:
    ids: list[int] = list(new.prompt_token_ids or ())
    start: int | None = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(GIVEN_ANSWER_START)
    return RunningRequest(slot, len(ids)) if start is None else RunningRequest(slot, start, ids[start:])


def _build_record(ended: EndedRequest | None, tokens: int) -> dict[str, Any] | None:
    """What is handed out of a request at its first so many tokens."""
    if ended is None or tokens < 1:
        return None
    beyond = int(ended.held.tokens[0]) - tokens
    if not 0 <= beyond < RECENT:
        return None
    held = ended.held if beyond == 0 else ended.held.taken(0)
    held.take_back(0, beyond)
    one = torch.zeros(1, dtype=torch.long)
    return {
        "psi": held.geometry(one)[0].numpy().tobytes(),
        "history": ended.history[:tokens].numpy().tobytes() if ended.history is not None else b"",
        "prompt_tokens": int(held.prompt_tokens[0]),
    }

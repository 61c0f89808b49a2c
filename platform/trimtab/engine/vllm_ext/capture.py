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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.detection.signals import (
    CHECK_INTERVAL,
    SignalAccumulator,
    TokenStatistics,
    compute_token_statistics,
    compute_window_means,
    gather_token_statistics,
)
from trimtab.engine.vllm_ext.answer_checker import AnswerChecker
from trimtab.engine.vllm_ext.capture_requests import (
    EndedRequest,
    PendingSamples,
    PendingVerdicts,
    RequestSpan,
    RunningRequest,
    build_record,
    requires_check,
    start_request,
)
from trimtab.engine.vllm_ext.detector_store import DetectorStore
from trimtab.engine.vllm_ext.prompt_checker import PromptChecker
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter, RunnerStep

# Number of positions whose logits are computed at once.
PIECE = 256


class SignalCapture:
    """Accumulator of the signals of a vLLM model runner.

    Args:
        runner: adapter of vLLM's model runner.
        layers: captured layers.
        history: whether to compute and store log-probability, entropy and margin of each token. A detector with any tau_l
            computes its phi from these.
        keep: maximum number of ended requests whose signals are kept until they are fetched.
        verdict_token: token that ends a request which a check stops.

    Attributes:
        detectors: detectors of the checks.
    """

    def __init__(self, runner: RunnerAdapter, layers: Sequence[int], history: bool, keep: int, verdict_token: int) -> None:
        self.runner = runner
        # Preempted requests keep their slots, in addition to the running ones.
        self.free = list(range(2 * runner.max_requests))
        self.sums = SignalAccumulator(len(self.free), len(layers), runner.width, runner.device)
        self.detectors = DetectorStore(layers, runner.device)
        self.prompt_checker = PromptChecker(self.detectors, len(self.free))
        self.answer_checker = AnswerChecker(self.detectors)
        self.verdict_token = verdict_token
        # Requests that got no slot although they must be checked.
        self.unchecked: set[str] = set()
        self.keeps_history = history
        shape = (len(self.free), runner.max_length, 3) if history else (0, 0, 3)
        self.history = torch.zeros(shape, device=runner.device)
        self.running: dict[str, RunningRequest] = {}
        self.ended: OrderedDict[str, EndedRequest] = OrderedDict()
        self.keep = keep
        self.pending: PendingSamples | None = None
        self.verdicts: PendingVerdicts | None = None
        # Requests whose unfinished answer is checked or recorded after this step has sampled.
        self.due: list[RequestSpan] = []
        self.block_size = runner.get_block_size()
        self.block_sums = torch.zeros(runner.count_blocks(), len(layers), runner.width, device=runner.device)
        runner.add_token_update(self._process_tokens)

    def begin_step(self, scheduled: Any) -> None:
        """Release the slots of finished requests, and assign slots to new ones. Called before a step.

        Args:
            scheduled: vLLM's scheduler output.
        """
        for request in scheduled.finished_req_ids:
            self.end_request(request)
            self.unchecked.discard(request)
        # The second model runner lists a preempted request that continues as new.
        added = [new for new in scheduled.scheduled_new_reqs if new.req_id not in self.running]
        self.unchecked |= {new.req_id for new in added[len(self.free) :] if requires_check(new)}
        fresh = added[: len(self.free)]
        for new in fresh:
            self.running[new.req_id] = start_request(self.free.pop(), new)
        if fresh:
            self.sums.clear(self._as_indices([self.running[new.req_id].slot for new in fresh]))

    def end_request(self, request: str) -> None:
        """Copy the signals of a request to the host, and free its slot."""
        if (running := self.running.pop(request, None)) is None:
            return
        if running.written:
            self.ended[request] = self._copy_request(running)
        self.free.append(running.slot)
        while len(self.ended) > self.keep:
            self.ended.popitem(last=False)

    def pop_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """Return the signals of a request, and discard the request.

        Args:
            request: engine id of the request.
            tokens: number of answer tokens to include.

        Returns:
            Record of the signals. None if the request is unknown or discarded, has no answer, or has more tokens after its stop
            than the accumulator can take back.
        """
        self.end_request(request)
        return build_record(self.ended.pop(request, None), tokens)

    def peek_signals(self, request: str, tokens: int) -> dict[str, Any] | None:
        """Return the signals of a request at its first `tokens` answer tokens, and keep the request.

        Arguments and result as in `pop_signals`.
        """
        if (running := self.running.get(request)) is None:
            return build_record(self.ended.get(request), tokens)
        return build_record(self._copy_request(running), tokens)

    def _copy_request(self, running: RunningRequest) -> EndedRequest:
        """Copy the signals of a request to the host."""
        history = self.history[running.slot, : running.written].to("cpu", copy=True) if self.keeps_history else None
        risks = self.prompt_checker.list_risks(running.slot, len(running.checks.prompt)) if running.written else []
        is_stored = running.is_recorded or running.stores_prompt
        windows = running.windows.cpu() if is_stored and running.windows is not None else None
        psi = torch.stack(running.running).cpu() if running.running else None
        prompt = running.prompt_psi.cpu() if running.prompt_psi is not None else None
        return EndedRequest(self.sums.taken(running.slot), history, risks, windows, psi, prompt)

    def accumulate_step(self) -> None:
        """Accumulate the states of a step. Called after the forward pass and before sampling."""
        if (step := self.runner.get_step()) is None:
            return
        first = step.counts.cumsum() - step.counts
        line = np.repeat(np.arange(len(step.counts)), step.counts)
        position = np.arange(len(line)) - np.repeat(first - step.starts, step.counts)
        rows = torch.stack([states[: len(line)] for states in step.layer_states], 1).float()
        self._add_to_blocks(line, position, rows)
        spans = self._build_spans(step, first)
        self._add_prompt_tails(spans, rows)
        self._write_supplied_answers(spans, rows, step.hidden_states)
        self._prepare_samples(step, spans, rows)

    def _build_spans(self, step: RunnerStep, first: NDArray[np.integer[Any]]) -> list[RequestSpan]:
        """Build the spans of the requests that have a slot."""
        columns = zip(step.requests, first.tolist(), step.starts.tolist(), step.counts.tolist(), strict=True)
        return [
            RequestSpan(index, running, *span)
            for index, (request, *span) in enumerate(columns)
            if (running := self.running.get(request)) is not None
        ]

    def _process_tokens(self, sampled: Tensor) -> None:
        """Add the sampled tokens [n, 1] to the accumulator, and end stopped requests."""
        if (pending := self.pending) is not None:
            self.pending = None
            statistics = None
            if pending.logp is not None:
                statistics = gather_token_statistics(pending.logp, sampled[pending.lines, 0].long())
            self._write_tokens(pending.slots, pending.states, statistics)
        if self.due:
            due, self.due = self.due, []
            self._process_unfinished(due)
        if (verdicts := self.verdicts) is not None:
            self.verdicts = None
            tokens = sampled[verdicts.lines, 0]
            sampled[verdicts.lines, 0] = tokens.masked_fill(verdicts.stopped, self.verdict_token)

    def _write_tokens(self, slots: Tensor, states: Tensor, statistics: TokenStatistics | None) -> None:
        if statistics is not None:
            positions = self.sums.tokens[slots]
            self.history[slots, positions] = torch.stack([statistics.logp, statistics.entropy, statistics.margin], 1)
        self.sums.write(slots, states)

    def _add_to_blocks(self, line: Any, position: Any, rows: Tensor) -> None:
        block = self.runner.get_blocks(line, position // self.block_size)
        self.block_sums[block[self._as_indices(position % self.block_size) == 0]] = 0
        self.block_sums.index_add_(0, block, rows)

    def _add_prompt_tails(self, spans: Sequence[RequestSpan], rows: Tensor) -> None:
        """Add the prompt tokens after the last full block.

        Each token is added once, although a preempted request computes its tokens again. A request with a supplied answer does
        not read the prefix cache, so that all its prompt tokens are added here.
        """
        selected: list[int] = []
        slots: list[int] = []
        for span in spans:
            running = span.running
            tail = 0 if running.supplied is not None else running.prompt - running.prompt % self.block_size
            added = span.select_rows(max(tail, running.read), running.prompt)
            running.read = max(running.read, min(running.prompt, span.end))
            selected += added
            slots += [running.slot] * len(added)
        if selected:
            self.sums.read(self._as_indices(slots), rows[self._as_indices(selected)])

    def _write_supplied_answers(self, spans: Sequence[RequestSpan], rows: Tensor, hidden: Tensor) -> None:
        """Add the tokens of supplied answers whose states this step computed.

        The accumulator takes at most one token per request and call. Thus the n-th tokens of all requests are written together.
        """
        entries: list[tuple[int, int, int, int]] = []
        recorded: list[tuple[RunningRequest, range]] = []
        for span in spans:
            running = span.running
            if running.supplied is None:
                continue
            # The state that a token is generated from is at the position before the token.
            start = running.prompt - 1
            offset = span.first - span.start + start
            added = span.select_rows(start + running.written, start + len(running.supplied))
            entries += [(turn, row, running.slot, running.supplied[row - offset]) for turn, row in enumerate(added)]
            if running.is_recorded:
                recorded.append((running, range(running.written + 1, running.written + 1 + len(added))))
            running.written += len(added)
        if not entries:
            return
        turns, selected, slots, tokens = self._as_indices(sorted(entries)).T
        columns: list[Tensor] = []
        if self.keeps_history:
            pieces = zip(selected.split(PIECE), tokens.split(PIECE), strict=True)
            parts = [compute_token_statistics(self.runner.compute_logits(hidden[piece]), ids) for piece, ids in pieces]
            columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("logp", "entropy", "margin")]
        sizes = turns.bincount().tolist()
        split = (values.split(sizes) for values in (slots, rows[selected], *columns))
        for turn, (slot, states, *values) in enumerate(zip(*split, strict=True)):
            self._write_tokens(slot, states, TokenStatistics(*values) if values else None)
            due = [running for running, numbers in recorded if turn < len(numbers) and numbers[turn] % CHECK_INTERVAL == 0]
            self._record_unfinished(due)

    def _prepare_samples(self, step: RunnerStep, spans: Sequence[RequestSpan], rows: Tensor) -> None:
        """Set `pending` to the requests that sample a new token, except those in mid-prompt or recomputing after preemption.

        Also store and check the prompts that end in this step.
        """
        sampled: list[RequestSpan] = []
        prompts: list[RequestSpan] = []
        for span in spans:
            running = span.running
            if running.supplied is not None or step.discarded[span.index] or span.end != running.prompt + running.written:
                continue
            if running.written == 0 and (running.is_tracked or running.needs_prompt_psi):
                self._add_full_blocks(span)
            if running.written == 0 and running.needs_prompt_psi:
                prompts.append(span)
            running.written += 1
            if running.is_tracked:
                sampled.append(span)
                if running.needs_running_psi:
                    self.due.append(span)
        if sampled:
            lines, slots, states = self._gather_last_states(sampled, rows)
            logp = self.runner.get_next_logits(lines).float().log_softmax(-1) if self.keeps_history else None
            self.pending = PendingSamples(lines, slots, states, logp)
        if prompts:
            self._process_prompts(prompts, rows)
        self._stop_unchecked(step)

    def _add_full_blocks(self, span: RequestSpan) -> None:
        """Add the full blocks of a prompt whose last token is in this step, and compute the means of its windows."""
        running, size = span.running, self.block_size
        full = running.prompt // size
        if not full:
            return
        blocks = self.block_sums[self.runner.get_blocks(np.full(full, span.index), np.arange(full))]
        self.sums.read_sum(self._as_indices([running.slot]), blocks.sum(0, keepdim=True), self._as_indices([full * size]))
        if running.is_recorded or running.stores_prompt or self.prompt_checker.reads_windows(running.checks.prompt):
            running.windows = compute_window_means(blocks, size, self.sums.prompt[running.slot], running.prompt)

    def _gather_last_states(self, spans: Sequence[RequestSpan], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices in the batch [n], slots [n] and last states [n, L, d] of requests."""
        lines = self._as_indices([span.index for span in spans])
        slots = self._as_indices([span.running.slot for span in spans])
        return lines, slots, rows[self._as_indices([span.first + span.count - 1 for span in spans])]

    def _process_prompts(self, spans: Sequence[RequestSpan], rows: Tensor) -> None:
        """Store and check the prompts of requests whose last prompt token is in this step."""
        lines, slots, states = self._gather_last_states(spans, rows)
        mean = self.sums.prompt[slots] / self.sums.prompt_tokens[slots, None, None]
        psi = torch.cat([states, mean, states - mean], -1)
        for span, row in zip(spans, psi, strict=True):
            if span.running.stores_prompt:
                span.running.prompt_psi = row
        checks, windows = zip(*((span.running.checks.prompt, span.running.windows) for span in spans), strict=True)
        if any(checks):
            self._add_verdicts(lines, self.prompt_checker.check_prompts(checks, slots, psi, windows))

    def _process_unfinished(self, spans: Sequence[RequestSpan]) -> None:
        """Record psi of unfinished answers, and check them."""
        self._record_unfinished([span.running for span in spans if span.running.is_recorded])
        checked = [span for span in spans if span.running.checks.answer]
        if not checked:
            return
        slots = self._as_indices([span.running.slot for span in checked])
        lengths = [span.running.written for span in checked]
        psi = self.sums.geometry(slots)
        history = self.history[slots, : max(lengths)] if self.keeps_history else psi.new_empty(len(slots), 0, 3)
        stopped = self.answer_checker.check_answers([span.running.checks.answer for span in checked], psi, history, lengths)
        self._add_verdicts(self._as_indices([span.index for span in checked]), stopped)

    def _record_unfinished(self, recorded: Sequence[RunningRequest]) -> None:
        if recorded:
            psi = self.sums.geometry(self._as_indices([running.slot for running in recorded]))
            for running, row in zip(recorded, psi.half(), strict=True):
                running.running.append(row)

    def _stop_unchecked(self, step: RunnerStep) -> None:
        """End the requests without a slot that must be checked."""
        lines = [line for line, request in enumerate(step.requests) if request in self.unchecked and not step.discarded[line]]
        if not lines:
            return
        self._add_verdicts(self._as_indices(lines), torch.ones(len(lines), dtype=torch.bool, device=self.runner.device))

    def _add_verdicts(self, lines: Tensor, stopped: Tensor) -> None:
        """Add verdicts [n] on the requests at these indices in the batch [n]; the next sample applies them."""
        if self.verdicts is not None:
            lines, stopped = torch.cat([self.verdicts.lines, lines]), torch.cat([self.verdicts.stopped, stopped])
        self.verdicts = PendingVerdicts(lines, stopped)

    def _as_indices(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.runner.device).long()

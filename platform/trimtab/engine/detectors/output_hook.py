"""Where outputs come back from vLLM's engine: they are counted, and where an answer ends, its risk is computed.

Answers pass through here on their way from the engine to vLLM's server; where one ends, its signals are fetched and a detector
gives its risk, before the server sees the end. So the risk is there when the response is written.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from trimtab.detection.detector import Detector
from trimtab.engine.context import steering
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.detectors.signal_client import SignalClient
from trimtab.engine.metrics import FIRST, NEXT, TOKENS, count_risk, request_labels
from trimtab.engine.vllm_ext import patches

log = logging.getLogger(__name__)

# What is fetched in vain is said to be unavailable, not waited for.
READ_SECONDS = 10.0


@dataclass
class OutputCounter:
    """What was seen of a request's outputs: tokens of each of its answers, which are these `choices` of the response, counted
    under these `labels`."""

    choices: range
    labels: tuple[str, str, str]
    tokens: Counter[int] = field(default_factory=Counter[int])


class OutputHook:
    """Put into a `vllm.AsyncLLM` by `install`; `reader` reads the signals of an engine that captures `layers`."""

    def __init__(self, reader: SignalClient, layers: Sequence[int]) -> None:
        self._reader = reader
        self._layers = layers

    def wrap_add_request(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        """Note the engine's id of each request: clients may send the same id twice."""

        async def add(request_id: str, *args: Any, **kwargs: Any) -> Any:
            collector = await add_request(request_id, *args, **kwargs)
            if (now := current_risk.get()) is not None:
                now.ids[request_id] = collector.request_id
            return collector

        return add

    def wrap_generate(self, generate: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
        """Count the outputs of each request, and score its answers."""

        def observed(prompt: Any, sampling: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
            outputs, now = generate(prompt, sampling, request_id, **options), current_risk.get()
            if now is None:
                return outputs
            first, now.choices = now.choices, now.choices + (sampling.n or 1)
            labels = request_labels(steering.get(), shadow=now.shadow)
            return self._observe(outputs, now, request_id, OutputCounter(range(first, now.choices), labels))

        return observed

    async def _observe(
        self, outputs: AsyncGenerator[Any], now: RequestRisk, request_id: str, seen: OutputCounter
    ) -> AsyncGenerator[Any]:
        began, last = time.perf_counter(), None
        async with aclosing(outputs) as own:
            async for output in own:
                at = time.perf_counter()
                # A whole answer at once has no first token.
                if not (output.finished and last is None):
                    (FIRST if last is None else NEXT).labels(*seen.labels).observe(at - (last or began))
                last = at
                written = sum(len(one.token_ids) for one in output.outputs)
                TOKENS.labels(*seen.labels).inc(written)
                now.tokens += written
                await asyncio.gather(*(self._score_output(one, now, request_id, seen) for one in output.outputs))
                yield output

    async def _score_output(self, one: Any, now: RequestRisk, request_id: str, seen: OutputCounter) -> None:
        seen.tokens[one.index] += len(one.token_ids)
        ended, choice = one.finish_reason is not None, seen.choices[one.index]
        now.ended += ended
        if now.detector is not None and seen.tokens[one.index] and (ended or now.running):
            engine_id = now.ids[request_id]
            name = engine_id if len(seen.choices) == 1 else f"{one.index}_{engine_id}"
            risk = await self._compute_risk(now.detector.artifact, name, now.given or seen.tokens[one.index], ended=ended)
            if risk is not None:
                now.risks[choice] = risk
            elif ended:
                now.risks.pop(choice, None)
        if ended:
            status = now.status if now.detector is None else "unavailable"
            count_risk(seen.labels, now.detector and now.detector.version, now.risks.get(choice), status)

    async def _compute_risk(self, detector: Detector, request: str, tokens: int, *, ended: bool) -> float | None:
        try:
            seen = await asyncio.wait_for(self._reader.fetch_signals(request, tokens, ended=ended), READ_SECONDS)
        except Exception:
            # The answer is good all the same, and says that it was not checked.
            log.warning("no signals of %s", request, exc_info=True)
            return None
        return None if seen is None else detector.score_answer(seen, self._layers)


def install_output_hook(engine: Any, layers: Sequence[int]) -> None:
    """Look at what a `vllm.AsyncLLM` that captures `layers` gives back."""
    outputs = OutputHook(SignalClient(engine.collective_rpc, len(layers)), layers)
    patches.patch_generate(engine, outputs.wrap_generate)
    patches.patch_add_request(engine, "output_hook", outputs.wrap_add_request)

"""Hook on the outputs of vLLM's engine that counts tokens and computes risks.

Outputs pass through the hook between the engine and vLLM's server. When an answer ends, the hook fetches its signals and
computes its risk with the detector, before the server receives the end. Thus the risk is known when the response is written.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from trimtab.detection.detector import Detector
from trimtab.engine.context import steering
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.detectors.signal_client import SignalClient
from trimtab.engine.metrics import FIRST, NEXT, TOKENS, count_risk, request_labels
from trimtab.engine.vllm_ext import patches

log = logging.getLogger(__name__)

# Maximum time for fetching signals. Afterwards the risk is reported as unavailable.
READ_SECONDS = 10.0


@dataclass
class OutputCounter:
    """Token counts of one engine request.

    Attributes:
        choices: indices of the request's answers in the response.
        labels: metric labels of the request.
        tokens: number of tokens by answer.
    """

    choices: range
    labels: tuple[str, str, str]
    tokens: Counter[int] = field(default_factory=Counter[int])


class OutputHook:
    """Output hook of a `vllm.AsyncLLM`; see `install_output_hook`.

    Args:
        reader: client for the engine's signals.
        layers: layers that the engine captures.
    """

    def __init__(self, reader: SignalClient, layers: Sequence[int]) -> None:
        self._reader = reader
        self._layers = layers

    def wrap_add_request(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `add_request` to record the engine's id of each request, since clients may send the same id twice."""

        async def add(request_id: str, *args: Any, **kwargs: Any) -> Any:
            collector = await add_request(request_id, *args, **kwargs)
            if (risk := current_risk.get()) is not None:
                risk.ids[request_id] = collector.request_id
            return collector

        return add

    def wrap_generate(self, generate: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
        """Wrap `generate` to count the outputs of each request and to score its answers."""

        def observed(prompt: Any, sampling: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
            outputs, risk = generate(prompt, sampling, request_id, **options), current_risk.get()
            if risk is None:
                return outputs
            first, risk.choices = risk.choices, risk.choices + (sampling.n or 1)
            labels = request_labels(steering.get(), shadow=risk.shadow)
            return self._observe(outputs, risk, request_id, OutputCounter(range(first, risk.choices), labels))

        return observed

    async def _observe(
        self, outputs: AsyncGenerator[Any], risk: RequestRisk, request_id: str, counter: OutputCounter
    ) -> AsyncGenerator[Any]:
        started, last = time.perf_counter(), None
        async with aclosing(outputs) as stream:
            async for output in stream:
                now = time.perf_counter()
                # A response that is not streamed has no time to first token.
                if not (output.finished and last is None):
                    (FIRST if last is None else NEXT).labels(*counter.labels).observe(now - (last or started))
                last = now
                tokens = sum(len(answer.token_ids) for answer in output.outputs)
                TOKENS.labels(*counter.labels).inc(tokens)
                risk.tokens += tokens
                await asyncio.gather(*(self._score_output(answer, risk, request_id, counter) for answer in output.outputs))
                yield output

    async def _score_output(self, answer: Any, risk: RequestRisk, request_id: str, counter: OutputCounter) -> None:
        counter.tokens[answer.index] += len(answer.token_ids)
        ended, choice = answer.finish_reason is not None, counter.choices[answer.index]
        risk.ended += ended
        tokens = counter.tokens[answer.index]
        if risk.detector is not None and tokens and (ended or risk.running):
            engine_id = risk.ids[request_id]
            name = engine_id if len(counter.choices) == 1 else f"{answer.index}_{engine_id}"
            value = await self._compute_risk(risk.detector.artifact, name, risk.given_tokens or tokens, ended=ended)
            if value is not None:
                risk.risks[choice] = value
            elif ended:
                risk.risks.pop(choice, None)
        if ended:
            status = risk.status if risk.detector is None else "unavailable"
            count_risk(counter.labels, risk.detector and risk.detector.version, risk.risks.get(choice), status)

    async def _compute_risk(self, detector: Detector, request: str, tokens: int, *, ended: bool) -> float | None:
        try:
            signals = await asyncio.wait_for(self._reader.fetch_signals(request, tokens, ended=ended), READ_SECONDS)
        except Exception:
            # The answer itself is complete. Its risk is reported as unavailable.
            log.warning("fetching the signals of request %s failed", request, exc_info=True)
            return None
        risk = None if signals is None else detector.score_answer(signals, self._layers)
        return risk if risk is not None and isfinite(risk) else None


def install_output_hook(engine: Any, layers: Sequence[int]) -> None:
    """Install the output hook in a `vllm.AsyncLLM`.

    Args:
        engine: the engine.
        layers: layers that the engine captures.
    """
    hook = OutputHook(SignalClient(engine.collective_rpc, len(layers)), layers)
    patches.patch_generate(engine, hook.wrap_generate)
    patches.patch_add_request(engine, "output_hook", hook.wrap_add_request)

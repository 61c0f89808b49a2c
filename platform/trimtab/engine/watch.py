"""Risks of the answers to one HTTP request, computed while vLLM writes them.

Answers pass through here on their way from the engine to vLLM's server; where one ends, its signals are fetched and a detector
gives its risk, before the server sees the end. So the risk is there when the response is written.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from trimtab.detector import Detector
from trimtab.engine.library import Loaded
from trimtab.engine.reader import SignalReader

log = logging.getLogger(__name__)

# What is fetched in vain is said to be unavailable, not waited for.
READ_SECONDS = 10.0


@dataclass
class Watch:
    """Who watches the answers to a request: a detector, or nobody for a `reason`.

    `alarms` is the share of false alarms that its threshold is chosen by; `running` gives risks of answers that are not done;
    `warning` says why risks may be off; `given` is the number of tokens of an answer that someone else wrote. `risks` are by
    the choices' indices, as far as they are known, of which so many have `ended`.
    """

    detector: Loaded[Detector] | None = None
    status: str = "off"
    reason: str | None = None
    alarms: str = "0.05"
    running: bool = False
    warning: str | None = None
    given: int = 0
    risks: dict[int, float] = field(default_factory=dict[int, float])
    ids: dict[str, str] = field(default_factory=dict[str, str])
    choices: int = 0
    ended: int = 0

    def fresh(self) -> "Watch":
        """The same watcher, for another answer."""
        return Watch(self.detector, self.status, self.reason, self.alarms, self.running, self.warning)

    @property
    def threshold(self) -> float | None:
        """The risk above which an answer is flagged."""
        return self.detector.part.card.thresholds[self.alarms] if self.detector else None

    def choice(self, index: int) -> dict[str, Any]:
        """What a choice says of its risk; nothing where that is not known."""
        risk, threshold = self.risks.get(index), self.threshold
        return {} if risk is None or threshold is None else {"risk": round(risk, 4), "flagged": risk > threshold}

    def as_json(self) -> dict[str, Any]:
        """The response's `trimtab.detector`: of its first choice, where there are several."""
        if self.detector is None:
            return {"status": self.status} | ({"reason": self.reason} if self.reason else {})
        known = self.detector.known
        named = {"name": known.name, "version": known.version, "run_id": known.run_id}
        said = named | {"false_alarms": float(self.alarms), "threshold": self.threshold}
        said |= {"warning": self.warning} if self.warning else {}
        if (first := self.choice(0)) == {}:
            pending = {"status": "unavailable", "reason": "other choices are not done"}
            missing = {"status": "unavailable", "reason": "the engine has no signals of this answer"}
            return (pending if self.ended < self.choices else missing) | said
        return {"status": "scored"} | first | said


watching: ContextVar[Watch | None] = ContextVar("watching", default=None)
"""Who watches the HTTP request that this task answers."""


def install(engine: Any, reader: SignalReader, layers: Sequence[int]) -> None:
    """Put the watch into a `vllm.AsyncLLM` that captures `layers`: where requests are added, and where outputs come back."""
    generate, add_request = engine.generate, engine.add_request

    async def add(request_id: str, *args: Any, **kwargs: Any) -> Any:
        collector = await add_request(request_id, *args, **kwargs)
        if (now := watching.get()) is not None:
            # Ids of clients need not differ; those of the engine do.
            now.ids[request_id] = collector.request_id
        return collector

    def watched(prompt: Any, sampling: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
        outputs, now = generate(prompt, sampling, request_id, **options), watching.get()
        if now is None or now.detector is None:
            return outputs
        first, now.choices = now.choices, now.choices + (sampling.n or 1)
        return _scored(outputs, now, now.detector.part, request_id, range(first, now.choices))

    async def _scored(
        outputs: AsyncGenerator[Any], now: Watch, detector: Detector, request_id: str, choices: range
    ) -> AsyncGenerator[Any]:
        tokens: Counter[int] = Counter()

        async def look(one: Any) -> None:
            tokens[one.index] += len(one.token_ids)
            ended = one.finish_reason is not None
            now.ended += ended
            if not tokens[one.index] or not (ended or now.running):
                return
            engine_id = now.ids[request_id]
            name = engine_id if len(choices) == 1 else f"{one.index}_{engine_id}"
            risk = await _risk(detector, name, now.given or tokens[one.index], ended=ended)
            if risk is not None:
                now.risks[choices[one.index]] = risk
            elif ended:
                now.risks.pop(choices[one.index], None)

        async with aclosing(outputs) as own:
            async for output in own:
                await asyncio.gather(*map(look, output.outputs))
                yield output

    async def _risk(detector: Detector, request: str, tokens: int, *, ended: bool) -> float | None:
        try:
            seen = await asyncio.wait_for(reader.read(request, tokens, ended=ended), READ_SECONDS)
        except Exception:
            # The answer is good all the same, and says that it was not checked.
            log.warning("no signals of %s", request, exc_info=True)
            return None
        return None if seen is None else detector.risk_of(seen, layers)

    engine.generate, engine.add_request = watched, add

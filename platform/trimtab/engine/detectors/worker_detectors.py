"""Detectors of prompts in the engine's workers, which check prompts at the end of their prefill."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from trimtab.detection.detector import Detector, encode_detector

# Number of detectors that stay in the workers without a request.
MAX_IDLE = 64


@dataclass
class ResidentDetector:
    """Detector in the workers.

    Attributes:
        added: task that sends it.
        users: number of running requests that use it.
    """

    added: asyncio.Task[None]
    users: int = 0


class WorkerDetectors:
    """Detectors of prompts in the workers of a running `vllm.AsyncLLM`. Not thread-safe: use it from one event loop.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._residents: OrderedDict[str, ResidentDetector] = OrderedDict()
        self._removals: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def lease(self, detectors: Iterable[Detector]) -> AsyncGenerator[None]:
        """Keep detectors in the workers while the context is open; it opens when they have arrived."""
        residents = [self._acquire(detector) for detector in {d.card.digest: d for d in detectors}.values()]
        try:
            # A request that is cancelled must not end the transfer for the others.
            await asyncio.gather(*(asyncio.shield(resident.added) for resident in residents))
            yield
        finally:
            for resident in residents:
                resident.users -= 1
            self._remove_idle()

    def _acquire(self, detector: Detector) -> ResidentDetector:
        digest = detector.card.digest
        if (resident := self._residents.get(digest)) is None:
            resident = self._residents[digest] = ResidentDetector(asyncio.create_task(self._add(detector)))
        self._residents.move_to_end(digest)
        resident.users += 1
        return resident

    async def _add(self, detector: Detector) -> None:
        try:
            await self._engine.collective_rpc("trimtab_add_detector", args=encode_detector(detector))
        except BaseException:
            del self._residents[detector.card.digest]
            raise

    def _remove_idle(self) -> None:
        idle = [digest for digest, resident in self._residents.items() if not resident.users and resident.added.done()]
        for digest in idle[: max(0, len(idle) - MAX_IDLE)]:
            del self._residents[digest]
            removal = asyncio.create_task(self._engine.collective_rpc("trimtab_remove_detector", args=(digest,)))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

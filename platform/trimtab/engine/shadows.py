"""A prefix's shadow: a version that is asked the same as the one that answers, and that nobody gets an answer from."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from trimtab.engine import http, metrics
from trimtab.engine.http import Scope
from trimtab.engine.library import Library
from trimtab.engine.residents import Residents
from trimtab.engine.watch import Watch
from trimtab.errors import TrimtabError
from trimtab.prefix import Prefix

MOST = 16


class Shadows:
    """Shadows of an engine that answers by `ask`."""

    def __init__(self, prefixes: Library[Prefix], residents: Residents, ask: Callable[..., Awaitable[None]]) -> None:
        self._prefixes = prefixes
        self._residents = residents
        self._ask = ask
        self._running: set[asyncio.Task[None]] = set()

    def start(self, request: dict[str, Any], name: str, alias: str, watched: Watch, scope: Scope) -> None:
        """Ask `alias` of the prefix the same, beside; nobody waits for it, and where too many run it is left out."""
        if len(self._running) >= MOST:
            return
        task = asyncio.create_task(self._run(request | {"stream": False}, name, alias, watched.fresh(shadow=True), scope))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, request: dict[str, Any], name: str, alias: str, watched: Watch, scope: Scope) -> None:
        request.pop("stream_options", None)
        collected = http.Collected()
        with suppress(TrimtabError):
            async with self._residents.steered(await self._prefixes.find(name, alias)) as now:
                try:
                    # What is noted of the shadow is none of the answer's.
                    await self._ask(request, now, watched, {**scope, http.NOTES: {}}, _never, collected)
                finally:
                    metrics.REQUESTS.labels(*metrics.steered(now, watched), str(collected.status)).inc()


async def _never() -> http.Message:
    """A client that stays."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}

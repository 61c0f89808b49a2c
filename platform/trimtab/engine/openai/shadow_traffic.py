"""Shadow traffic: copies of requests to another version of a prefix."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine import asgi
from trimtab.engine.asgi import Scope
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.metrics import REQUESTS, request_labels
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.slots import PrefixSlots
from trimtab.errors import TrimtabError

MAX_SHADOWS = 16


class ShadowTraffic:
    """Shadow requests: copies of requests to another version, whose answers are discarded.

    Args:
        prefixes: catalog of prefixes.
        slots: slots of the engine.
        forward: forwards a request to vLLM.
    """

    def __init__(self, prefixes: VersionCatalog[Prefix], slots: PrefixSlots, forward: Callable[..., Awaitable[None]]) -> None:
        self._prefixes = prefixes
        self._slots = slots
        self._forward = forward
        self._running: set[asyncio.Task[None]] = set()

    def start(self, request: dict[str, Any], name: str, alias: str, risk: RequestRisk, scope: Scope) -> None:
        """Start a shadow request in the background, unless `MAX_SHADOWS` are running.

        Args:
            request: request body.
            name: name of the prefix.
            alias: alias of the shadow version.
            risk: detector of the request.
            scope: ASGI scope of the request.
        """
        if len(self._running) >= MAX_SHADOWS:
            return
        task = asyncio.create_task(self._run(request | {"stream": False}, name, alias, risk.copy_settings(shadow=True), scope))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, request: dict[str, Any], name: str, alias: str, risk: RequestRisk, scope: Scope) -> None:
        request.pop("stream_options", None)
        response = asgi.ResponseBuffer()
        with suppress(TrimtabError):
            async with self._slots.lease_slots(await self._prefixes.find(name, alias)) as steering:
                try:
                    await self._forward(request, steering, risk, scope, _receive_nothing, response)
                finally:
                    REQUESTS.labels(*request_labels(steering, shadow=risk.shadow), str(response.status)).inc()


async def _receive_nothing() -> asgi.Message:
    """Wait forever, as the `receive` of a client that never disconnects."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}

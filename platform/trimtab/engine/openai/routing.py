"""Traffic split between the versions of a prefix, and shadow traffic."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.data.prompt import hash_to_fraction
from trimtab.engine import asgi
from trimtab.engine.asgi import Scope
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.metrics import REQUESTS, request_labels
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.slots import PrefixSlots
from trimtab.errors import TrimtabError, UsageError

MAX_SHADOWS = 16


class ShadowTraffic:
    """Shadow requests: copies of requests to another version, whose answers are discarded.

    Args:
        prefixes: catalog of prefixes.
        slots: slots of the engine.
        ask: forwards a request to vLLM.
    """

    def __init__(self, prefixes: VersionCatalog[Prefix], slots: PrefixSlots, ask: Callable[..., Awaitable[None]]) -> None:
        self._prefixes = prefixes
        self._slots = slots
        self._ask = ask
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
                    await self._ask(request, steering, risk, scope, _receive_nothing, response)
                finally:
                    REQUESTS.labels(*request_labels(steering, shadow=risk.shadow), str(response.status)).inc()


async def _receive_nothing() -> asgi.Message:
    """Wait forever, as the `receive` of a client that never disconnects."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


@dataclass(frozen=True)
class TrafficSplit:
    """Traffic between the versions of each prefix.

    Attributes:
        weights: shares of requests by prefix and alias, as {"mine": {"champion": 95, "candidate": 5}}. The champion answers all
            requests for other prefixes.
        shadow: alias of the shadow version by prefix. It receives a copy of each request, and its answers are discarded.

    Raises:
        UsageError: if the shares of a prefix are empty, negative, or all 0.
    """

    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    shadow: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, shares in self.weights.items():
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise UsageError(f"traffic of {name!r} needs shares of at least 0, one of them above 0")

    def select_alias(self, name: str, user: str | None) -> str | None:
        """Select the alias that answers a request.

        Args:
            name: name of the prefix.
            user: the request's `user`. With unchanged weights, a user always gets the same alias. If None, the alias is random.

        Returns:
            The alias; None for the champion of a prefix without weights.
        """
        shares = self.weights.get(name)
        if not shares:
            return None
        point = (hash_to_fraction(f"{name} {user}", 0) if user else random.random()) * sum(shares.values())
        for alias, share in shares.items():
            if point < share:
                return alias
            point -= share
        return max(shares, key=lambda alias: shares[alias])

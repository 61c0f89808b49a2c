"""A prefix's shadow: a version that is asked the same as the one that answers, and that nobody gets an answer from."""

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
    """Shadows of an engine that answers by `ask`."""

    def __init__(self, prefixes: VersionCatalog[Prefix], residents: PrefixSlots, ask: Callable[..., Awaitable[None]]) -> None:
        self._prefixes = prefixes
        self._residents = residents
        self._ask = ask
        self._running: set[asyncio.Task[None]] = set()

    def start(self, request: dict[str, Any], name: str, alias: str, watched: RequestRisk, scope: Scope) -> None:
        """Ask `alias` of the prefix the same, beside; nobody waits for it, and where too many run it is left out."""
        if len(self._running) >= MAX_SHADOWS:
            return
        task = asyncio.create_task(
            self._run(request | {"stream": False}, name, alias, watched.copy_settings(shadow=True), scope)
        )
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, request: dict[str, Any], name: str, alias: str, watched: RequestRisk, scope: Scope) -> None:
        request.pop("stream_options", None)
        collected = asgi.ResponseBuffer()
        with suppress(TrimtabError):
            async with self._residents.lease_slots(await self._prefixes.find(name, alias)) as now:
                try:
                    # What is noted of the shadow is none of the answer's.
                    await self._ask(request, now, watched, {**scope, asgi.NOTES: {}}, _receive_nothing, collected)
                finally:
                    REQUESTS.labels(*request_labels(now, shadow=watched.shadow), str(collected.status)).inc()


async def _receive_nothing() -> asgi.Message:
    """A client that stays."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


@dataclass(frozen=True)
class TrafficSplit:
    """`weights` are by prefix and alias, as {"mine": {"champion": 95, "candidate": 5}}; of a prefix that is not in them the
    champion answers. `shadow` names an alias of a prefix that is asked as well, and whose answers nobody gets.

    Raises UsageError for weights that say nothing.
    """

    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    shadow: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, shares in self.weights.items():
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise UsageError(f"traffic of {name!r} needs shares that are not below 0, and one above")

    def select_alias(self, name: str, user: str | None) -> str | None:
        """The alias that answers; the same one for a user as long as the weights are the same. None for the champion."""
        shares = self.weights.get(name)
        if not shares:
            return None
        place = (hash_to_fraction(f"{name} {user}", 0) if user else random.random()) * sum(shares.values())
        for alias, share in shares.items():
            if place < share:
                return alias
            place -= share
        return max(shares, key=lambda alias: shares[alias])

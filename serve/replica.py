"""A Serve replica: one online engine behind Serve's own HTTP path.

Serve pickles a deployment class by value, so the app that it is to call lives here, in a module that each replica imports.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from trimtab import base as bases
from trimtab.base import BaseModel

from .config import ServeConfig
from .registry_source import Detectors, Prefixes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_engine: list[Any] = []


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI app of this replica's engine."""
    await _engine[0](scope, receive, send)


def build_app() -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """What Serve calls in each replica to get its app."""
    return app


class Replica:
    """Starts the engine, answers health checks, and stops the engine at the end."""

    async def __init__(self, base: BaseModel, config: ServeConfig) -> None:
        # Not on top: the process that deploys replicas need not import vLLM.
        from trimtab.engine.online import OnlineEngine

        local = bases.here(base)
        detectors = Detectors(local)
        wanted = await asyncio.to_thread(detectors.layers) if config.detect and not config.engine.layers else ()
        layers = config.engine.layers or wanted
        engine = replace(config.engine, layers=layers, history=bool(layers))
        _engine[:] = [await OnlineEngine.start(local, engine, Prefixes(local), detectors, config.detector)]

    async def check_health(self) -> None:
        """Called by Serve; a replica whose engine has died is replaced."""
        await _engine[0].check_health()

    async def __del__(self) -> None:
        if _engine:
            await _engine.pop().stop()

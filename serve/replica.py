"""A Serve replica: one online engine behind Serve's own HTTP path.

Serve pickles a deployment class by value, so the app that it is to call lives here, in a module that each replica imports.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab import base as bases
from trimtab.base import BaseModel
from trimtab.engine.http import App, Headers, Receive, Scope, Send
from trimtab.engine.traffic import Traffic

from . import pages, sources
from .access import Access
from .config import ServeConfig

_engine: list[Any] = []
_doors: list[App] = []
_pages: dict[str, tuple[Headers, bytes]] = {}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI app of this replica: its engine, and the page."""
    if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and (page := _pages.get(scope["path"] or "/")):
        headers, body = page
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] == "GET" else b""})
        return
    await _doors[0](scope, receive, send)


def build_app() -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """What Serve calls in each replica to get its app."""
    return app


class Replica:
    """Starts the engine, answers health checks, and stops the engine at the end."""

    async def __init__(self, base: BaseModel, config: ServeConfig) -> None:
        # Not on top: the process that deploys replicas need not import vLLM.
        from trimtab.engine.online import OnlineEngine

        local = bases.here(base)
        _pages.update(await asyncio.to_thread(pages.load))
        prefixes, detectors = sources.opened(local, config.registry)
        wanted = await asyncio.to_thread(sources.layers, detectors) if config.detect and not config.engine.layers else ()
        layers = config.engine.layers or wanted
        engine = replace(config.engine, layers=layers, history=bool(layers))
        _engine[:] = [await OnlineEngine.start(local, engine, prefixes, detectors, config.detector)]
        _doors[:] = [Access(_engine[0], Path(config.key_file)) if config.key_file else _engine[0]]

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve after the start, and where `user_config` changes: traffic moves without a restart."""
        _engine[0].traffic = Traffic(user_config.get("traffic", {}), user_config.get("shadow", {}))

    async def check_health(self) -> None:
        """Called by Serve; a replica whose engine has died is replaced."""
        await _engine[0].check_health()

    async def __del__(self) -> None:
        if _engine:
            await _engine.pop().stop()

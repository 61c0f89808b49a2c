"""Ray Serve replica: one online engine with its middleware, behind Serve's HTTP proxy.

Serve pickles a deployment class by value, so the ASGI app is a function of this module, which each replica imports.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve

from trimtab.engine import asgi
from trimtab.engine.asgi import App, Headers, Message, Receive, Scope, Send
from trimtab.engine.openai.routing import TrafficSplit
from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.ray_patches import patch_replica_address
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessLogMiddleware
from trimtab.serve.middleware.admission import AdmissionMiddleware
from trimtab.serve.middleware.authentication import AuthenticationMiddleware
from trimtab.serve.record_sinks import RecordSinks, open_sinks
from trimtab.serve.registry.coordinator_client import CoordinatorClient
from trimtab.serve.registry.sources import find_detector_layers, open_sources
from trimtab.serve.static_page import load_page

log = logging.getLogger(__name__)

METRICS = "/metrics"
LOOK_SECONDS = 0.1
TEXT = (b"content-type", CONTENT_TYPE_LATEST.encode())

_engine: list[Any] = []
_middleware: list[App] = []
_peers: list[CoordinatorClient] = []
_sinks: list[RecordSinks] = []
_pages: dict[str, tuple[Headers, bytes]] = {}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a request: the static page, or the engine behind the middleware. This is the ASGI app of the replica."""
    if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and (page := _pages.get(scope["path"] or "/")):
        headers, body = page
        await asgi.send_response(send, 200, headers, body if scope["method"] == "GET" else b"")
        return
    await _middleware[0](scope, receive, _suppress_error_when_dead(send))


def _suppress_error_when_dead(send: Send) -> Send:
    """Return a `send` that withholds errors of a dead engine: this process exits, and HAProxy retries on another replica."""

    async def hold(message: Message) -> None:
        is_error = message["type"] == "http.response.start" and message["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR
        if is_error and _engine and not _engine[0].is_healthy():
            await asyncio.Event().wait()
        await send(message)

    return hold


def get_asgi_app() -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return the ASGI app; Serve calls this in each replica."""
    return app


async def answer_request(scope: Scope, receive: Receive, send: Send) -> None:
    """Forward a request to the engine; answer `/metrics` for all replicas if there are several."""
    if _peers and scope["type"] == "http" and scope["method"] == "GET" and scope["path"].rstrip("/") == METRICS:
        body = await asyncio.to_thread(_peers[0].metrics)
        await asgi.send_response(send, 200, asgi.set_content_length([TEXT], body), body)
        return
    await _engine[0](scope, receive, send)


async def _exit_when_engine_dies() -> None:
    """Exit the process when its engine has died, so that Serve replaces the replica and HAProxy uses the others at once.

    With health checks alone, a replica that fails every request quickly would look like the least loaded one.
    """
    while _engine and _engine[0].is_healthy():
        await asyncio.sleep(LOOK_SECONDS)
    if _engine:
        os._exit(1)


class Replica:
    """Deployment class that starts and stops the engine and answers health checks.

    Args:
        base: base model.
        config: settings of the server.
        coordinator: Serve handle of the version coordinator; None for a single replica.
    """

    async def __init__(self, base: BaseModel, config: ServeConfig, coordinator: Any = None) -> None:
        # Imported lazily: the process that deploys the replicas need not import vLLM.
        from trimtab.engine.openai.app import OnlineEngine

        patch_replica_address()
        local = resolve_on_node(base)
        _pages.update(await asyncio.to_thread(load_page))
        prefixes, detectors = open_sources(local, config.registry)
        replica = serve.get_replica_context().replica_id.unique_id
        if coordinator is not None:
            _peers[:] = [CoordinatorClient(coordinator, replica)]
        layers = config.engine.layers
        if config.detect and not layers:
            live = await _peers[0].get_agreed_versions("detector") if _peers else {}
            layers = await asyncio.to_thread(find_detector_layers, detectors, live)
        engine = replace(config.engine, layers=layers, token_statistics=bool(layers))
        _sinks[:] = [await asyncio.to_thread(open_sinks, config, replica)]
        agree = _peers[0].agree if _peers else None
        _engine[:] = [await OnlineEngine.start(local, engine, prefixes, detectors, config.detector, agree)]
        middleware: App = AdmissionMiddleware(
            answer_request,
            config.max_ongoing_requests + config.max_queued_requests,
            config.request_timeout_s,
            config.stream_timeout_s,
        )
        middleware = AuthenticationMiddleware(middleware, Path(config.api_key_file)) if config.api_key_file else middleware
        _middleware[:] = [AccessLogMiddleware(middleware, _sinks[0], with_text=config.log_text)]
        self._watch = asyncio.create_task(_exit_when_engine_dies())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Update the traffic split without a restart; Serve calls this after the start and when `user_config` changes.

        Invalid values are logged and ignored: Serve stops a replica that raises here, and all replicas get the same values.

        Args:
            user_config: values of `traffic` and `shadow`.
        """
        try:
            _engine[0].handler.traffic = TrafficSplit(user_config.get("traffic", {}), user_config.get("shadow", {}))
        except (UsageError, TypeError, AttributeError) as error:
            log.error("invalid user_config, traffic split unchanged: %s", error)

    async def check_health(self) -> None:
        """Raise an error if the engine has died, so that Serve replaces the replica."""
        await _engine[0].check_health()

    async def __del__(self) -> None:
        if _engine:
            await _engine.pop().stop()
        if _peers:
            await _peers.pop().leave()
        if _sinks:
            await asyncio.to_thread(_sinks.pop().stop)

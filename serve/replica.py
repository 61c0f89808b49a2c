"""Ray Serve replica: one online engine with its middleware, behind Serve's HTTP proxy."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from ray import serve

from trimtab.detection.live_labels import LabelJournal
from trimtab.engine import asgi
from trimtab.engine.asgi import App, Message, Receive, Scope, Send
from trimtab.engine.openai.traffic_split import TrafficSplit
from trimtab.engine.policies import parse_policies
from trimtab.engine.request_context import RequestContext
from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.ray_patches import patch_http10_streams, patch_replica_address
from trimtab.serve.api_keys import LOOPBACK, get_default_path
from trimtab.serve.config import ServeConfig
from trimtab.serve.live.answer_ids import open_answer_ids
from trimtab.serve.live.assessments import AssessmentSink
from trimtab.serve.live.feedback import FeedbackMiddleware
from trimtab.serve.live.signal_store import SignalStore, open_signal_store
from trimtab.serve.metrics import CachedMetrics
from trimtab.serve.middleware.access_log import AccessLogMiddleware
from trimtab.serve.middleware.admission import AdmissionMiddleware
from trimtab.serve.middleware.authentication import METRICS, AuthenticationMiddleware, HostMiddleware, OpenPathMiddleware
from trimtab.serve.record_sinks import RecordSinks, open_sinks
from trimtab.serve.registry.coordinator_client import CoordinatorClient
from trimtab.serve.registry.sources import ReadSignals, find_read_signals, open_sources
from trimtab.serve.static_page import ABOUT, build_about, load_page
from trimtab.util.heap import start_heap_trimmer
from trimtab.util.remote_paths import open_folder

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
# Longer than the process takes to notice that its engine has died.
HOLD_SECONDS = 5.0
TEXT = (b"content-type", CONTENT_TYPE_LATEST.encode())


class Replica:
    """Deployment class: starts and stops the engine, serves requests and answers health checks.

    Args:
        base: base model.
        config: settings of the server.
        coordinator: Serve handle of the version coordinator; None for a single replica.
    """

    async def __init__(self, base: BaseModel, config: ServeConfig, coordinator: Any = None) -> None:
        # Imported lazily: the process that deploys the replicas need not import vLLM.
        from trimtab.engine.openai.app import OnlineEngine

        # Serve calls `__del__` also if the start fails.
        self._engine: OnlineEngine | None = None
        self._peers: CoordinatorClient | None = None
        self._sinks: RecordSinks | None = None
        self._signals: SignalStore | None = None
        self._assessments: AssessmentSink | None = None
        self._metrics = CachedMetrics(self._collect_metrics)
        patch_replica_address()
        patch_http10_streams()
        start_heap_trimmer()
        local = resolve_on_node(base)
        self._pages = load_page()
        self._about = await asyncio.to_thread(partial(build_about, feedback=config.keep_signals is not None))
        prefixes, detectors = open_sources(local, config.registry)
        replica = serve.get_replica_context().replica_id.unique_id
        if coordinator is not None:
            self._peers = CoordinatorClient(coordinator, replica)
        read = ReadSignals()
        if config.detect:
            live = await self._peers.get_agreed_versions("detector") if self._peers else {}
            read = await asyncio.to_thread(find_read_signals, detectors, live)
        layers = config.engine.layers or read.layers
        # Live traffic trains heads of all kinds.
        is_stored = config.keep_signals is not None and config.signals_history and "answer" in config.signals_subjects
        statistics = config.engine.token_statistics or read.token_statistics or is_stored
        engine = replace(config.engine, layers=layers, token_statistics=bool(layers) and statistics)
        self._sinks = await asyncio.to_thread(open_sinks, config, replica)
        agree = self._peers.agree if self._peers else None
        policies = parse_policies(config.policies, "policies")
        if config.keep_signals is not None:
            self._signals = await asyncio.to_thread(open_signal_store, config, local, engine)
        arguments = config.detector, agree, policies, self._signals
        self._engine = await OnlineEngine.start(local, engine, prefixes, detectors, *arguments)
        self._middleware = await asyncio.to_thread(self._build_middleware, config, self._sinks, replica)
        self._watch = asyncio.create_task(self._exit_when_engine_dies(self._engine.is_healthy))

    def __serve_build_asgi_app__(self) -> App:
        """Return the ASGI app of the replica; Serve calls this after the start."""

        # A function: uvicorn, which Serve uses, takes a bound method for an app of ASGI version 2.
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self.serve_request(scope, receive, send)

        return app

    async def serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request: the static page, or the engine behind the middleware."""
        if scope["type"] == "http":
            if scope["method"] in ("GET", "HEAD") and (page := self._pages.get(scope["path"] or "/")):
                headers, body = page
                await asgi.send_response(send, 200, headers, body if scope["method"] == "GET" else b"")
                return
            RequestContext.get(scope, receive, send).on_start(self._hold_error_when_dead)
        await self._middleware(scope, receive, send)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Update the traffic split without a restart; Serve calls this after the start and when `user_config` changes.

        Invalid values are logged and ignored: Serve stops a replica that raises here, and all replicas get the same values.

        Args:
            user_config: values of `traffic` and `shadow`.
        """
        try:
            split = TrafficSplit(user_config.get("traffic", {}), user_config.get("shadow", {}))
        except (UsageError, TypeError, AttributeError) as error:
            log.error("invalid user_config, traffic split unchanged: %s", error)
            return
        if self._engine is not None:
            self._engine.handler.traffic = split

    async def check_health(self) -> None:
        """Raise an error if the engine has died, so that Serve replaces the replica."""
        if self._engine is not None:
            await self._engine.check_health()

    async def __del__(self) -> None:
        # Without an engine, the task that watches it must not end the process.
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
        if self._peers is not None:
            await self._peers.leave()
        if self._sinks is not None:
            await asyncio.to_thread(self._sinks.stop)
        if self._signals is not None:
            await asyncio.to_thread(self._signals.stop)
        if self._assessments is not None:
            await asyncio.to_thread(self._assessments.stop)

    def _build_middleware(self, config: ServeConfig, sinks: RecordSinks, replica: str) -> App:
        most = config.max_ongoing_requests + config.max_queued_requests
        app: App = AdmissionMiddleware(self._answer_request, most, config.request_timeout_s, config.stream_timeout_s)
        if config.keep_signals is not None:
            folder = open_folder(config.keep_signals)
            self._assessments = AssessmentSink() if config.trace_sampling_ratio > 0 else None
            app = FeedbackMiddleware(app, open_answer_ids(folder), LabelJournal(folder, replica), self._assessments)
        path = Path(config.api_key_file) if config.api_key_file else get_default_path()
        limit = config.max_concurrent_per_key or max(1, most // 2)
        app = AuthenticationMiddleware(app, path, limit, share_cache=config.share_cache)
        app = OpenPathMiddleware(AccessLogMiddleware(app, sinks, with_text=config.log_text))
        return app if config.api_key_file or config.host not in LOOPBACK else HostMiddleware(app)

    async def _answer_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the engine; answer `/metrics` for all replicas, and the data of the page."""
        path = scope["path"].rstrip("/") if scope["type"] == "http" and scope["method"] == "GET" else None
        if path == ABOUT:
            headers, body = self._about
            await asgi.send_response(RequestContext.get(scope, receive, send).send, 200, headers, body)
        elif path == METRICS:
            body = await self._metrics.get()
            send = RequestContext.get(scope, receive, send).send
            await asgi.send_response(send, 200, asgi.set_content_length([TEXT], body), body)
        elif self._engine is not None:
            await self._engine(scope, receive, send)

    def _collect_metrics(self) -> bytes:
        return self._peers.collect_metrics() if self._peers is not None else generate_latest(REGISTRY)

    async def _hold_error_when_dead(self, start: Message) -> None:
        """Withhold an error of a dead engine: this process exits, and HAProxy retries the request on another replica."""
        is_error = start["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR
        if is_error and self._engine is not None and not self._engine.is_healthy():
            await asyncio.sleep(HOLD_SECONDS)

    async def _exit_when_engine_dies(self, is_healthy: Callable[[], bool]) -> None:
        """Exit the process when its engine has died, so that Serve replaces the replica and HAProxy uses the others at once.

        With health checks alone, a replica that fails every request quickly would look like the least loaded one.
        """
        while is_healthy():
            await asyncio.sleep(LOOK_SECONDS)
        if self._engine is not None:
            # Not sys.exit: Serve would catch it, and threads of the dead engine could keep the process alive.
            os._exit(1)

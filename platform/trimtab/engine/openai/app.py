"""ASGI app of vLLM's server with prefixes and detectors, for OpenAI's and Anthropic's protocols.

A request's `model` is `<base>`, `<base>:<prefix>` or `<base>:<prefix>@<alias or version>`. The app replaces it by the base
model's name, forwards the request to vLLM, and adds version and risk to the response. The prefix's slot tokens are inserted
where vLLM renders the messages. The app runs with and without Ray Serve.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

from vllm import AsyncEngineArgs, AsyncLLMEngine
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from trimtab.artifacts.prefix import Prefix, check_base
from trimtab.detection.detector import Detector
from trimtab.engine import asgi
from trimtab.engine.asgi import BufferedRequest, Receive, Scope, Send
from trimtab.engine.config import EngineConfig
from trimtab.engine.detectors.drift_monitor import DriftMonitors
from trimtab.engine.detectors.output_hook import install_output_hook
from trimtab.engine.detectors.request_risk import DetectorSelector
from trimtab.engine.detectors.worker_detectors import WorkerDetectors
from trimtab.engine.metrics import REFRESHED, SLOTS_USED, VERSIONS_REFUSED, remove_version_series, set_alias_versions
from trimtab.engine.openai.cancellation import CancellableApp
from trimtab.engine.openai.handler import SCORE_PATH, RequestHandler
from trimtab.engine.openai.malformed import (
    MALFORMED_ERRORS,
    install_malformed_handlers,
    install_rejection,
    was_accepted,
)
from trimtab.engine.openai.models import ModelList
from trimtab.engine.openai.moderations import MODERATIONS_PATH
from trimtab.engine.openai.openapi import build_openapi_document
from trimtab.engine.openai.policy_resolver import PolicyResolver
from trimtab.engine.openai.request_fields import find_request_fields
from trimtab.engine.policies import Policy
from trimtab.engine.prefixes.catalog import VersionCatalog, VersionNames
from trimtab.engine.prefixes.message_hook import install_message_hook
from trimtab.engine.prefixes.slots import PrefixSlots, SlotTable
from trimtab.engine.prefixes.token_guard import install_token_guard
from trimtab.engine.prefixes.version_loader import ArtifactSource
from trimtab.engine.protocols.errors import send_error, send_failure
from trimtab.engine.protocols.paths import CHAT_PATH, COUNT_PATH, PROTOCOLS
from trimtab.engine.recording import SignalSink
from trimtab.engine.request_context import RequestContext
from trimtab.engine.vllm_ext.args import build_engine_args, get_verdict_token
from trimtab.engine.vllm_ext.environment import engine_environment
from trimtab.engine.vllm_ext.grammars import install_grammar_validation
from trimtab.engine.vllm_ext.patches import patch_detokenizer, patch_messages_conversion
from trimtab.engine.vllm_ext.tool_parsers import select_tool_parser
from trimtab.errors import ArtifactError, NotFoundError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.types import SUBJECTS

log = logging.getLogger(__name__)

# Further paths of vLLM's server. Paths that administer the engine are not forwarded.
FORWARDED_PATHS = ("/health", "/ping", "/version", "/metrics", "/tokenize", "/detokenize")
OPENAPI, MODELS = "/openapi.json", "/v1/models"
PREFIX, DETECTOR = "prefix", "detector"
REFRESH_SECONDS = 1.0
# Close code of a websocket (RFC 6455).
POLICY_VIOLATION = 1008
# Shorter than the time after which an engine without a report counts as gone.
REPORT_SECONDS = 3.0

AgreeOnVersions = Callable[[VersionNames], Awaitable[VersionNames]]


async def _agree_alone(names: VersionNames) -> VersionNames:
    return names


def _check_prefix(prefix: Prefix, base: BaseModel, slots: int) -> None:
    check_base(prefix, base)
    if len(prefix.vectors) > slots:
        raise ArtifactError(
            f"prefix {prefix.card.name!r} has {len(prefix.vectors)} vectors; this server has {slots} slots. Start "
            f"the server with --engine.num_slots {len(prefix.vectors)} or more"
        )


class OnlineEngine:
    """Online engine and its ASGI app. Create it with `start`, call it as an ASGI app, and end it with `stop`."""

    def __init__(
        self,
        engine: AsyncLLMEngine,
        app: Any,
        base: BaseModel,
        config: EngineConfig,
        prefixes: VersionCatalog[Prefix],
        detectors: DetectorSelector,
        agree: AgreeOnVersions,
        policies: Sequence[Policy],
        drift: DriftMonitors,
        sink: SignalSink | None = None,
    ) -> None:
        self.base = base
        self._drift = drift
        self.prefixes = prefixes
        self.detectors = detectors
        self.refused: Mapping[str, Mapping[str, str]] = {}
        renderer = build_renderer(base, config.num_slots)
        self.slots = PrefixSlots(engine, SlotTable(renderer.first_slot, config.num_slots))
        self._app = CancellableApp(app, partial(engine.abort, internal=True))
        fields = find_request_fields(app, (*PROTOCOLS, COUNT_PATH))
        self._worker_detectors = WorkerDetectors(engine)
        resolver = PolicyResolver(base.name, detectors.library, policies)
        arguments = prefixes, detectors, self.slots, resolver, self._worker_detectors
        self.handler = RequestHandler(engine, self._app, base, renderer, *arguments, fields, sink)
        self._engine = engine
        self._openapi = app.openapi
        self._agree = agree
        self._started = int(time.time())
        self._max_model_len = config.max_model_len
        self._refresh_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        base: BaseModel,
        config: EngineConfig,
        prefixes: ArtifactSource[Prefix],
        detectors: ArtifactSource[Detector],
        detector: str | None = None,
        agree: "AgreeOnVersions | None" = None,
        policies: Sequence[Policy] = (),
        sink: SignalSink | None = None,
    ) -> "OnlineEngine":
        """Start vLLM, mask and guard its reserved token ids, and load every champion.

        Args:
            base: base model.
            config: configuration of the engine.
            prefixes: source of the prefixes.
            detectors: source of the detectors.
            detector: detector of requests that name none: NAME, NAME@ALIAS or NAME@VERSION.
            agree: agrees on versions with other engines: maps the versions that this engine can serve to those that all engines
                serve. If None, this engine serves its own.
            policies: policies of all requests.
            sink: sink of the answers' signals; None to store none.

        Returns:
            The engine, ready for requests.

        Raises:
            TrimtabError: if the registry cannot be read, or the configuration is invalid.
        """
        args = build_engine_args(base, config)
        with engine_environment(config):
            engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**args))
        options: Any = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        options.model, options.served_model_name = args["model"], [base.name]
        options.disable_fastapi_docs, options.allowed_origins = True, []
        options.tool_call_parser = select_tool_parser(base, config.tool_parser)
        options.enable_auto_tool_choice = options.tool_call_parser is not None
        app = build_app(options, ("generate",), engine.model_config)
        install_malformed_handlers(app)
        await init_app_state(engine, app.state, options, ("generate",))
        patch_messages_conversion(app.state.anthropic_serving_messages, MALFORMED_ERRORS, was_accepted)
        patch_detokenizer()
        renderer = build_renderer(base, config.num_slots)
        await engine.collective_rpc("trimtab_mask_reserved_ids", args=(renderer.first_slot,))
        install_message_hook(engine, renderer)
        install_token_guard(engine, renderer)
        drift = DriftMonitors()
        install_output_hook(engine, config.layers, get_verdict_token(base, config), renderer, drift)
        install_grammar_validation(engine)
        install_rejection(engine)
        catalog = VersionCatalog(base.name, PREFIX, prefixes, partial(_check_prefix, base=base, slots=config.num_slots))
        selector = DetectorSelector(base, config.layers, detectors, detector, token_statistics=config.token_statistics)
        online = cls(engine, app, base, config, catalog, selector, agree or _agree_alone, policies, drift, sink)
        await online.refresh()
        online._refresh_task = asyncio.create_task(online._refresh_forever())
        return online

    async def stop(self) -> None:
        """Stop the engine's processes."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        self._engine.shutdown()

    async def refresh(self) -> None:
        """Read the registry, update the aliases, and write new champions into free slots.

        Prefixes that do not fit into free slots are written on demand.

        Raises:
            TrimtabError: if the registry cannot be read. The aliases are unchanged.
        """
        reports = asyncio.create_task(self._report_while_reading())
        try:
            aliases = {PREFIX: await self.prefixes.refresh(), DETECTOR: await self.detectors.refresh()}
        except TrimtabError:
            await self._report_current()
            raise
        finally:
            reports.cancel()
        available = VersionNames(aliases, self._list_refused())
        agreed = await self._agree(available)
        for kind, catalog in ((PREFIX, self.prefixes), (DETECTOR, self.detectors.library)):
            before = catalog.aliases
            await catalog.set_aliases(agreed.aliases[kind])
            set_alias_versions(kind, before, catalog.aliases)
            for version in catalog.evict_unused():
                remove_version_series(kind, version.name, version.version)
        self.refused = agreed.refused
        await self.slots.preload(self.prefixes.list_champions())
        champions = [champion.artifact for champion in self.detectors.library.list_champions()]
        async with self._worker_detectors.lease(d for d in champions if d.card.subject == "prompt"):
            pass
        SLOTS_USED.set(self.slots.count_taken())
        VERSIONS_REFUSED.set(sum(map(len, self.refused.values())))
        if not self.prefixes.source.is_cached:
            REFRESHED.set_to_current_time()

    async def _report_while_reading(self) -> None:
        """Report at intervals: a read or download may take longer than others wait for a report."""
        # An engine that starts has nothing to report yet, and must not delay the others.
        while self._refresh_task is not None:
            await asyncio.sleep(REPORT_SECONDS)
            with suppress(TrimtabError):
                await self._report_current()

    async def _report_current(self) -> None:
        """Report the current aliases, so that other engines do not switch to a version that this engine has not loaded."""
        await self._agree(VersionNames({PREFIX: self.prefixes.aliases, DETECTOR: self.detectors.library.aliases}, {}))

    def _list_refused(self) -> dict[str, dict[str, str]]:
        return {PREFIX: self.prefixes.refused, DETECTOR: self.detectors.library.refused}

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except TrimtabError:
                # The engine keeps serving its versions during an outage of the registry.
                continue
            except Exception:
                # An unexpected error must not end this task: the engine would never see new versions again.
                log.exception("refreshing versions from the registry failed")

    def is_healthy(self) -> bool:
        """Return whether the engine runs without a fatal error."""
        return not self._engine.errored

    async def check_health(self) -> None:
        """Check the engine.

        Raises:
            Exception: vLLM's error if the engine has died.
        """
        await self._engine.check_health()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] == "websocket":
            # No key, limit or detector applies to the endpoints that vLLM or a plug-in of it may add.
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext.get(scope, receive, send)
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        if path == MODELS and method == "GET":
            models = {"object": "list", "data": self._build_model_list().list_entries()}
            await asgi.send_json(context.send, 200, models)
        elif path.startswith(f"{MODELS}/") and method == "GET":
            await self._send_model(path.removeprefix(f"{MODELS}/"), context)
        elif path == OPENAPI and method == "GET":
            document = build_openapi_document(self._openapi(), (*FORWARDED_PATHS, *PROTOCOLS, COUNT_PATH, MODELS))
            await asgi.send_json(context.send, 200, document)
        elif path in (*PROTOCOLS, COUNT_PATH, SCORE_PATH, MODERATIONS_PATH) and method == "POST":
            await self.handler(scope, receive, send)
        elif path in (*FORWARDED_PATHS, *PROTOCOLS, COUNT_PATH, MODELS):
            await self._forward(scope, context)
        else:
            await send_failure(context.send, path, HTTPStatus.NOT_FOUND, f"there is no {method} {path} on this server")

    async def _send_model(self, model: str, context: RequestContext) -> None:
        try:
            await asgi.send_json(context.send, 200, self._build_model_list().find_entry(model))
        except NotFoundError as error:
            await send_error(context.send, MODELS, error)

    async def _forward(self, scope: Scope, context: RequestContext) -> None:
        """Forward a request that trimtab does not change to vLLM, with a bounded body and without a `trimtab` field."""
        if scope["method"] != "POST":
            await self._app(scope, context.receive, context.send)
            return
        try:
            if (body := await context.read_body()) is None:
                return
            if body and "trimtab" in (await context.read_json() or {}):
                raise UsageError(f"{scope['path']} accepts no trimtab field: no detector checks its answers. Use {CHAT_PATH}")
        except TrimtabError as error:
            await send_error(context.send, scope["path"], error)
            return
        replayed = BufferedRequest(scope, context.receive, body)
        del body
        context.release_body()
        await self._app(replayed.scope, replayed.receive, context.send)

    def _build_model_list(self) -> ModelList:
        prefixes, (answers, prompts) = self.prefixes.list_aliases(), map(self.detectors.list_aliases, SUBJECTS)
        facts = self.base.name, self._started, self._max_model_len
        return ModelList(*facts, prefixes, answers, prompts, self.refused, self._drift.describe())

"""vLLM's own OpenAI server with prefixes and detectors: one ASGI app, the same under Ray Serve and by itself.

A request's `model` is `<base>`, `<base>:<prefix>` or `<base>:<prefix>@<alias or version>`. The app turns it into the base
model's name and the prefix's row tokens, lets vLLM answer, and writes what answered, and how risky it is, into the response.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from vllm import AsyncEngineArgs, AsyncLLMEngine
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from trimtab.artifacts.prefix import Prefix, check_base
from trimtab.detection.detector import Detector
from trimtab.engine import asgi
from trimtab.engine.asgi import BufferedRequest, InternalErrorTo400, Receive, Scope, Send
from trimtab.engine.config import EngineConfig
from trimtab.engine.detectors.output_hook import install_output_hook
from trimtab.engine.detectors.request_risk import DetectorSelector
from trimtab.engine.metrics import REFRESHED, ROWS, VERSIONS_REFUSED, set_alias_versions
from trimtab.engine.openai.cancellation import CancellableApp
from trimtab.engine.openai.handler import SCORE_PATH, STEERED_PATHS, RequestHandler
from trimtab.engine.openai.openapi import build_openapi_document
from trimtab.engine.prefixes.catalog import ArtifactSource, VersionCatalog, VersionNames
from trimtab.engine.prefixes.slots import PrefixSlots, SlotTable
from trimtab.engine.prefixes.token_guard import install_token_guard
from trimtab.engine.vllm_ext.args import build_engine_args
from trimtab.errors import ArtifactError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer

log = logging.getLogger(__name__)

# What else of vLLM's server is let through: nothing that administers the engine.
FORWARDED_PATHS = ("/health", "/ping", "/version", "/metrics", "/tokenize", "/detokenize", "/v1/responses", "/v1/messages")
OPENAPI = "/openapi.json"
PREFIX, DETECTOR = "prefix", "detector"
REFRESH_SECONDS = 1.0

AgreeOnVersions = Callable[[VersionNames], Awaitable[VersionNames]]


async def _agree_alone(names: VersionNames) -> VersionNames:
    return names


def _check_prefix(prefix: Prefix, base: BaseModel, rows: int) -> None:
    check_base(prefix, base)
    if len(prefix.vectors) > rows:
        raise ArtifactError(
            f"prefix {prefix.card.name!r} has {len(prefix.vectors)} rows; this server has {rows}: start it with "
            f"--engine.rows {len(prefix.vectors)} or more"
        )


class OnlineEngine:
    """An engine that answers HTTP. Make it with `start`, call it as an ASGI app, end it with `stop`."""

    def __init__(
        self,
        engine: AsyncLLMEngine,
        app: Any,
        base: BaseModel,
        config: EngineConfig,
        prefixes: VersionCatalog[Prefix],
        watchers: DetectorSelector,
        agree: AgreeOnVersions,
    ) -> None:
        self.base = base
        self.prefixes = prefixes
        self.detectors = watchers
        self.refused: Mapping[str, Mapping[str, str]] = {}
        renderer = build_renderer(base, config.rows)
        self.slots = PrefixSlots(engine, SlotTable(renderer.first_row, config.rows))
        self._app = CancellableApp(app, partial(engine.abort, internal=True))
        self.handler = RequestHandler(engine, self._app, base, renderer, prefixes, watchers, self.slots)
        self._engine = engine
        self._openapi = app.openapi
        self._agree = agree
        self._fresh: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        base: BaseModel,
        config: EngineConfig,
        prefixes: ArtifactSource[Prefix],
        detectors: ArtifactSource[Detector],
        detector: str | None = None,
        agree: "AgreeOnVersions | None" = None,
    ) -> "OnlineEngine":
        """Start vLLM, mask and guard its rows, and load every champion; ready for traffic when this returns.

        `detector` names the one that watches where a request names none. `agree` says what several engines answer with, told
        what this one could.
        """
        args = build_engine_args(base, config)
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**args))
        options: Any = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        options.model, options.served_model_name = args["model"], [base.name]
        options.disable_fastapi_docs, options.allowed_origins = True, []
        options.enable_auto_tool_choice, options.tool_call_parser = bool(config.tool_parser), config.tool_parser
        app = build_app(options, ("generate",), engine.model_config)
        await init_app_state(engine, app.state, options, ("generate",))
        renderer = build_renderer(base, config.rows)
        await engine.collective_rpc("trimtab_mask_reserved_ids", args=(renderer.first_row,))
        install_token_guard(engine, renderer)
        install_output_hook(engine, config.layers)
        library = VersionCatalog(base.name, PREFIX, prefixes, partial(_check_prefix, base=base, rows=config.rows))
        watchers = DetectorSelector(base, config.layers, detectors, detector)
        online = cls(engine, app, base, config, library, watchers, agree or _agree_alone)
        await online.refresh()
        online._fresh = asyncio.create_task(online._refresh_forever())
        return online

    async def stop(self) -> None:
        """Stop the engine's processes."""
        if self._fresh is not None:
            self._fresh.cancel()
        self._engine.shutdown()

    async def refresh(self) -> None:
        """Read the registry now, and put new champions into rows that are free; others get theirs when they are asked for.

        Raises a TrimtabError where the registry cannot be read; names stay as they are then.
        """
        try:
            mine = VersionNames(
                {PREFIX: await self.prefixes.refresh(), DETECTOR: await self.detectors.refresh()}, self._list_refused()
            )
        except TrimtabError:
            # So that other engines wait with a new version until this one can have it too.
            await self._agree(VersionNames({PREFIX: self.prefixes.aliases, DETECTOR: self.detectors.library.aliases}, {}))
            raise
        agreed = await self._agree(mine)
        for kind, library in ((PREFIX, self.prefixes), (DETECTOR, self.detectors.library)):
            before = library.aliases
            await library.set_aliases(agreed.aliases[kind])
            set_alias_versions(kind, before, library.aliases)
        self.refused = agreed.refused
        await self.slots.preload(self.prefixes.list_champions())
        ROWS.set(self.slots.count_taken())
        VERSIONS_REFUSED.set(sum(map(len, self.refused.values())))
        if not self.prefixes.source.is_cached:
            REFRESHED.set_to_current_time()

    def _list_refused(self) -> dict[str, dict[str, str]]:
        return {PREFIX: self.prefixes.refused, DETECTOR: self.detectors.library.refused}

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except TrimtabError:
                # An outage of the registry changes nothing here, and the next round may find it back.
                continue
            except Exception:
                # So does what nobody thought of: who stops looking would answer with old versions for ever.
                log.exception("the registry could not be read")

    def is_healthy(self) -> bool:
        """Whether the engine lives."""
        return not self._engine.errored

    async def check_health(self) -> None:
        """Raises where the engine has died."""
        await self._engine.check_health()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        if path == "/v1/models" and method == "GET":
            await asgi.send_json(send, 200, self._describe_models())
        elif path == OPENAPI and method == "GET":
            await asgi.send_json(
                send, 200, build_openapi_document(self._openapi(), (*FORWARDED_PATHS, *STEERED_PATHS, "/v1/models"))
            )
        elif path in (*STEERED_PATHS, SCORE_PATH) and method == "POST":
            await self.handler(scope, receive, InternalErrorTo400(send, self.is_healthy))
        elif path in (*FORWARDED_PATHS, *STEERED_PATHS, "/v1/models"):
            await self._forward(scope, receive, InternalErrorTo400(send, self.is_healthy))
        else:
            await asgi.send_json(send, 404, asgi.build_error_body(404, f"there is no {method} {path} here"))

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What vLLM answers by itself, to requests of a bounded size that ask nothing of ours."""
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            if (body := await asgi.read_body(receive)) is None:
                return
            if body and "trimtab" in asgi.parse_body(body):
                raise UsageError(f"{scope['path']} takes no trimtab field: nothing watches its answers; use {STEERED_PATHS[0]}")
        except TrimtabError as error:
            await asgi.send_error(send, error)
            return
        replayed = BufferedRequest(scope, receive, body)
        await self._app(replayed.scope, replayed.receive, send)

    def _describe_models(self) -> dict[str, Any]:
        """The OpenAI list of models: the base with its detectors, and every prefix under its own name, with what is live."""
        common = {"object": "model", "created": 0, "owned_by": "trimtab"}
        watching_ = {"detectors": self.detectors.library.list_aliases(), "refused": self.refused.get(DETECTOR, {})}
        base = {"id": self.base.name, **common, "trimtab": watching_}
        refused = self.refused.get(PREFIX, {})
        steered = [
            {"id": f"{self.base.name}:{name}", **common, "parent": self.base.name}
            | {"trimtab": {"aliases": aliases, "refused": {k: why for k, why in refused.items() if k.startswith(f"{name}@")}}}
            for name, aliases in sorted(self.prefixes.list_aliases().items())
        ]
        return {"object": "list", "data": [base, *steered]}

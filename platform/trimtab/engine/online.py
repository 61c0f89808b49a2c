"""vLLM's own OpenAI server with prefixes and detectors: one ASGI app, the same under Ray Serve and by itself.

A request's `model` is `<base>`, `<base>:<prefix>` or `<base>:<prefix>@<alias or version>`. The app turns it into the base
model's name and the prefix's row tokens, lets vLLM answer, and writes what answered, and how risky it is, into the response.
"""

import asyncio
import json
from contextlib import suppress
from typing import Any

from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from trimtab import chat
from trimtab.base import BaseModel
from trimtab.detector import Detector
from trimtab.engine import guard, http, metrics, outputs, policy, wishes
from trimtab.engine.arguments import engine_args
from trimtab.engine.config import EngineConfig
from trimtab.engine.guard import Steering, steering
from trimtab.engine.http import Collected, Receive, Replayed, Scope, Send
from trimtab.engine.library import Library, Loaded, Source
from trimtab.engine.policy import Reply
from trimtab.engine.respond import Rewriter, model_name, said
from trimtab.engine.rows import RowTable
from trimtab.engine.score import score
from trimtab.engine.traffic import Traffic
from trimtab.engine.watch import Watch, watching
from trimtab.engine.watchers import Watchers
from trimtab.errors import NotFoundError, TrimtabError, UsageError
from trimtab.prefix import Prefix, check_base

STEERED = ("/v1/chat/completions", "/v1/completions")
SCORE = "/v1/score"
# What else of vLLM's server is let through: nothing that administers the engine.
PLAIN = ("/health", "/ping", "/version", "/metrics", "/tokenize", "/detokenize", "/v1/responses", "/v1/messages")
REFRESH_SECONDS = 2.0
MOST_SHADOWS = 16


class OnlineEngine:
    """An engine that answers HTTP. Make it with `start`, call it as an ASGI app, end it with `stop`."""

    def __init__(
        self, engine: AsyncLLM, app: Any, base: BaseModel, config: EngineConfig, prefixes: Library[Prefix], watchers: Watchers
    ) -> None:
        self.base = base
        self.prefixes = prefixes
        self.watchers = watchers
        self.renderer = chat.renderer(base, config.rows)
        self.table = RowTable(self.renderer.first_row, config.rows)
        self._engine = engine
        self._app = app
        self.traffic = Traffic()
        self._writing = asyncio.Lock()
        self._shadows: set[asyncio.Task[None]] = set()
        self._fresh: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        base: BaseModel,
        config: EngineConfig,
        prefixes: Source[Prefix],
        detectors: Source[Detector],
        detector: str | None = None,
    ) -> "OnlineEngine":
        """Start vLLM, mask and guard its rows, and load every champion; ready for traffic when this returns.

        `detector` names the one that watches where a request names none.
        """
        args = engine_args(base, config)
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        options: Any = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        options.model, options.served_model_name = args["model"], [base.name]
        options.disable_fastapi_docs = True
        app = build_app(options, ("generate",), engine.model_config)
        await init_app_state(engine, app.state, options, ("generate",))
        renderer = chat.renderer(base, config.rows)
        await engine.collective_rpc("trimtab_prepare", args=(renderer.first_row,))
        guard.install(engine, renderer)
        outputs.install(engine, config.layers)
        library = Library(base.name, "prefix", prefixes, lambda prefix: check_base(prefix, base))
        online = cls(engine, app, base, config, library, Watchers(base, config.layers, detectors, detector))
        await online.refresh()
        online._fresh = asyncio.create_task(online._keep_fresh())
        return online

    async def stop(self) -> None:
        """Stop the engine's processes."""
        if self._fresh is not None:
            self._fresh.cancel()
        self._engine.shutdown()

    async def refresh(self) -> None:
        """Read the registry now, and put new champions into rows that are free; others get theirs when they are asked for."""
        await self.prefixes.refresh()
        await self.watchers.refresh()
        for loaded in self.prefixes.champions():
            if self.table.fits(loaded.part.card.digest, len(loaded.part.vectors)):
                await self._acquire(loaded)
                self.table.release(loaded.part.card.digest)
        metrics.ROWS.set(sum(len(resident.rows) for resident in self.table.residents().values()))
        metrics.REFUSED.set(len(self.prefixes.refused) + len(self.watchers.library.refused))
        metrics.REFRESHED.set_to_current_time()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            # An outage of the registry changes nothing here, and the next round may find it back.
            with suppress(TrimtabError):
                await self.refresh()

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
            await http.send_json(send, 200, self._models())
        elif path in (*STEERED, SCORE) and method == "POST":
            await self._answer(path, scope, receive, send)
        elif path in (*PLAIN, *STEERED, "/v1/models"):
            await self._app(scope, receive, send)
        else:
            await http.send_json(send, 404, http.error_body(404, f"there is no {method} {path} here"))

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that a prefix may steer and a detector may watch."""
        loaded: Loaded[Prefix] | None = None
        now: Steering | None = None
        send = told = http.Told(send)
        try:
            body = await http.read(receive)
            if body is None:
                return
            request = http.parse(body)
            wished = wishes.parse(request.pop("trimtab", None))
            loaded = await self._named(request)
            watched = await self.watchers.chosen(wished, loaded and loaded.part, request)
            now = await self._steer(loaded) if loaded else None
            if path == SCORE:
                await self._score(request, now, watched, send)
            elif wished.policy == "annotate":
                self._shadowed(request, loaded, watched, scope)
                await self._ask(request, now, watched, scope, receive, send)
            else:
                policy.check(wished, request, watched)
                reply = await policy.answer(lambda changed: self._reply(changed, now, watched, scope, receive), wished, request)
                await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
                await send({"type": "http.response.body", "body": reply.body})
        except TrimtabError as error:
            await http.send_error(send, error)
        finally:
            metrics.REQUESTS.labels(*metrics.steered(now, None), str(told.status)).inc()
            if loaded is not None and now is not None:
                self.table.release(loaded.part.card.digest)

    async def _ask(
        self, request: dict[str, Any], now: Steering | None, watched: Watch, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let vLLM answer, steered and watched."""
        replayed = Replayed(scope, receive, self._rewritten(request, now, scope["path"]))
        steering.set(now)
        watching.set(watched)
        await self._app(replayed.scope, replayed.receive, Rewriter(send, self.base.name, now, watched))

    async def _reply(
        self, request: dict[str, Any], now: Steering | None, watched: Watch, scope: Scope, receive: Receive
    ) -> Reply:
        collected, fresh = Collected(), watched.fresh()
        await self._ask(request, now, fresh, scope, receive, collected)
        return Reply(collected.status, collected.headers, collected.body, fresh)

    async def _score(self, request: dict[str, Any], now: Steering | None, watched: Watch, send: Send) -> None:
        if watched.detector is not None:
            steering.set(now)
            watching.set(watched)
            tokens = await score(self._engine, self.renderer, request, now, watched)
        else:
            tokens = 0
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        scored = {"object": "score", "model": model_name(self.base.name, now), "usage": usage, "trimtab": said(now, watched)}
        await http.send_json(send, 200, scored)

    async def _named(self, request: dict[str, Any]) -> Loaded[Prefix] | None:
        """The version that `model` names; None for the base model and for names that vLLM is to judge."""
        model = request.get("model")
        if not isinstance(model, str) or not model.startswith(f"{self.base.name}:"):
            return None
        name, _, ref = model[len(self.base.name) + 1 :].partition("@")
        user = request.get("user")
        if not ref and (alias := self.traffic.alias(name, user if isinstance(user, str) else None)):
            # An alias that is not set has no share.
            with suppress(NotFoundError):
                return await self.prefixes.find(name, alias)
        return await self.prefixes.find(name, ref or None)

    def _shadowed(self, request: dict[str, Any], loaded: Loaded[Prefix] | None, watched: Watch, scope: Scope) -> None:
        """Ask the shadow of a prefix the same, beside; nobody waits for it, and where too many run it is left out."""
        alias = self.traffic.shadow.get(loaded.known.name) if loaded else None
        if loaded is not None and alias and len(self._shadows) < MOST_SHADOWS:
            task = asyncio.create_task(self._shadow(request | {"stream": False}, loaded.known.name, alias, watched, scope))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _shadow(self, request: dict[str, Any], name: str, alias: str, watched: Watch, scope: Scope) -> None:
        collected, never = http.Collected(), asyncio.Event()

        async def receive() -> http.Message:
            await never.wait()
            return {"type": "http.disconnect"}

        request.pop("stream_options", None)
        unseen = watched.fresh(shadow=True)
        with suppress(TrimtabError):
            loaded = await self.prefixes.find(name, alias)
            now = await self._steer(loaded)
            try:
                await self._ask(request, now, unseen, scope, receive, collected)
            finally:
                self.table.release(loaded.part.card.digest)
                metrics.REQUESTS.labels(*metrics.steered(now, unseen), str(collected.status)).inc()

    async def _steer(self, loaded: Loaded[Prefix]) -> Steering:
        rows = await self._acquire(loaded)
        known, prefix = loaded.known, loaded.part
        return Steering(known.name, known.version, known.run_id, prefix.card.place, rows, prefix.salt)

    async def _acquire(self, loaded: Loaded[Prefix]) -> tuple[int, ...]:
        """Rows of a prefix for one request, written first where they are new."""
        digest = loaded.part.card.digest
        # Under the lock, so that nobody runs with rows that another request is still writing.
        async with self._writing:
            rows, fresh = self.table.acquire(digest, len(loaded.part.vectors))
            if fresh:
                try:
                    vectors = loaded.part.vectors.numpy().tobytes()
                    await self._engine.collective_rpc("trimtab_write", args=(list(rows), vectors))
                except BaseException:
                    self.table.forget(digest)
                    raise
        return rows

    def _rewritten(self, request: dict[str, Any], now: Steering | None, path: str) -> bytes:
        """The request as vLLM is to see it. Raises UsageError where the prefix has no place in it."""
        if now is None:
            return json.dumps(request).encode()
        changed = request | {"model": self.base.name}
        if now.place != "start":
            messages = request.get("messages")
            if messages == []:
                raise UsageError("messages must hold at least one message")
            chats = path.rstrip("/").endswith("/chat/completions")
            if chats and isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
                changed["messages"] = self.renderer.mark(messages, now.place, now.rows)
            elif not chats:
                raise UsageError(
                    f"prefix {now.name!r} goes into the {now.place} of a chat: use /v1/chat/completions (plain completions "
                    "take prefixes of place start)"
                )
        return json.dumps(changed).encode()

    def _models(self) -> dict[str, Any]:
        """The OpenAI list of models: the base with its detectors, and every prefix under its own name."""
        common = {"object": "model", "created": 0, "owned_by": "trimtab"}
        base = {"id": self.base.name, **common, "trimtab": {"detectors": self.watchers.library.names()}}
        named = sorted(self.prefixes.names().items())
        steered = [
            {"id": f"{self.base.name}:{name}", **common, "parent": self.base.name, "trimtab": {"aliases": aliases}}
            for name, aliases in named
        ]
        return {"object": "list", "data": [base, *steered]}

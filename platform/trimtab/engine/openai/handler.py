"""How one request is answered: prefix and detector are found, vLLM is asked, and what answered is written into its response."""

import json
from contextlib import suppress
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine import asgi, extensions, metrics
from trimtab.engine.asgi import App, Collected, Receive, Replayed, Scope, Send
from trimtab.engine.context import Steering, steering
from trimtab.engine.detectors import policy
from trimtab.engine.detectors.policy import Reply
from trimtab.engine.detectors.request_risk import Watch, Watchers, watching
from trimtab.engine.openai.response_rewriter import Rewriter, model_name, said
from trimtab.engine.openai.routing import Shadows, Traffic
from trimtab.engine.openai.score import score
from trimtab.engine.prefixes.catalog import Library, Loaded
from trimtab.engine.prefixes.slots import Residents
from trimtab.errors import NotFoundError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import Renderer

STEERED = ("/v1/chat/completions", "/v1/completions")
SCORE = "/v1/score"
MOST_ANSWERS = 128


def _check_count(request: dict[str, Any]) -> None:
    """UsageError where one request asks for more answers than OpenAI's own API gives: each takes room in the engine."""
    count = request.get("n")
    if isinstance(count, int | None) and (count or 1) * policy.prompts(request) > MOST_ANSWERS:
        raise UsageError(f"a request may ask for {MOST_ANSWERS} answers at most, n times its prompts")


class Answering:
    """Answers requests for `base` by `app`, vLLM's own server of `engine`. `traffic` may be replaced at any time."""

    def __init__(
        self,
        engine: Any,
        app: App,
        base: BaseModel,
        renderer: Renderer,
        prefixes: Library[Prefix],
        watchers: Watchers,
        residents: Residents,
    ) -> None:
        self.traffic = Traffic()
        self._engine = engine
        self._app = app
        self._base = base
        self._renderer = renderer
        self._prefixes = prefixes
        self._watchers = watchers
        self._residents = residents
        self._shadows = Shadows(prefixes, residents, self._ask)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that a prefix may steer and a detector may watch."""
        now: Steering | None = None
        send = told = asgi.Told(send)
        try:
            body = await asgi.read(receive)
            if body is None:
                return
            request = asgi.parse(body)
            wished = extensions.parse(request.pop("trimtab", None))
            _check_count(request)
            loaded = await self._named(request, scope["path"])
            watched = await self._watchers.chosen(wished, loaded and loaded.part, request)
            async with self._residents.steered(loaded) as now:
                asgi.note(scope, model=model_name(self._base.name, now))
                if scope["path"].rstrip("/") == SCORE:
                    await self._score(request, now, watched, send)
                elif wished.policy == "annotate":
                    if now and (alias := self.traffic.shadow.get(now.name)):
                        self._shadows.start(request, now.name, alias, watched, scope)
                    await self._ask(request, now, watched, scope, receive, send)
                else:
                    policy.check(wished, request, watched)

                    async def ask(changed: dict[str, Any]) -> Reply:
                        collected, fresh = Collected(), watched.fresh()
                        await self._ask(changed, now, fresh, scope, receive, collected)
                        return Reply(collected.status, collected.headers, collected.body, fresh)

                    reply = await policy.answer(ask, wished, request)
                    await asgi.send_whole(send, reply.status, reply.headers, reply.body)
        except TrimtabError as error:
            await asgi.send_error(send, error)
        except RecursionError:
            await asgi.send_error(send, UsageError("the request is nested too deeply"))
        finally:
            metrics.REQUESTS.labels(*metrics.request_labels(now), str(told.status)).inc()

    async def _ask(
        self, request: dict[str, Any], now: Steering | None, watched: Watch, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let vLLM answer, steered and watched."""
        replayed = Replayed(scope, receive, self._rewritten(request, now, scope["path"]))
        steering.set(now)
        watching.set(watched)
        await self._app(replayed.scope, replayed.receive, Rewriter(send, self._base.name, now, watched))
        asgi.note(scope, tokens=watched.tokens, detector=watched.label, risk=watched.risks.get(0))

    async def _score(self, request: dict[str, Any], now: Steering | None, watched: Watch, send: Send) -> None:
        tokens = 0
        if watched.detector is not None:
            steering.set(now)
            watching.set(watched)
            tokens = await score(self._engine, self._renderer, request, now, watched)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        scored = {"object": "score", "model": model_name(self._base.name, now), "usage": usage, "trimtab": said(now, watched)}
        await asgi.send_json(send, 200, scored)

    async def _named(self, request: dict[str, Any], path: str) -> Loaded[Prefix] | None:
        """The version that `model` names; None for the base model and for names that vLLM is to judge. Raises NotFoundError
        for a name of nothing, where vLLM is not asked."""
        model = request.get("model")
        if not isinstance(model, str) or not model.startswith(f"{self._base.name}:"):
            if path.rstrip("/") == SCORE and model not in (None, self._base.name):
                raise NotFoundError(f"no model {str(model)[:80]!r}; there is {self._base.name}, and its prefixes")
            return None
        name, _, ref = model[len(self._base.name) + 1 :].partition("@")
        user = request.get("user")
        if not ref and (alias := self.traffic.alias(name, user if isinstance(user, str) else None)):
            # An alias that is not set has no share.
            with suppress(NotFoundError):
                return await self._prefixes.find(name, alias)
        return await self._prefixes.find(name, ref or None)

    def _rewritten(self, request: dict[str, Any], now: Steering | None, path: str) -> bytes:
        """The request as vLLM is to see it. Raises UsageError where the prefix has no place in it."""
        if now is None:
            return json.dumps(request).encode()
        changed = request | {"model": self._base.name}
        if now.place != "start":
            messages = request.get("messages")
            if messages == []:
                raise UsageError("messages must hold at least one message")
            chats = path.rstrip("/").endswith("/chat/completions")
            if chats and isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
                changed["messages"] = self._renderer.mark(messages, now.place, now.rows)
            elif not chats:
                raise UsageError(
                    f"prefix {now.name!r} goes into the {now.place} of a chat: use /v1/chat/completions (plain completions "
                    "take prefixes of place start)"
                )
        return json.dumps(changed).encode()

"""How one request is answered: prefix and detector are found, vLLM is asked, and what answered is written into its response."""

import json
from contextlib import suppress
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine import asgi
from trimtab.engine.asgi import App, BufferedRequest, Receive, ResponseBuffer, Scope, Send
from trimtab.engine.context import Steering, steering
from trimtab.engine.detectors.policy import PolicyReply, apply_policy, check_policy, count_prompts
from trimtab.engine.detectors.request_risk import DetectorSelector, RequestRisk, current_risk
from trimtab.engine.extensions import parse_options
from trimtab.engine.metrics import REQUESTS, request_labels
from trimtab.engine.openai.response_rewriter import ResponseRewriter, build_trimtab_field, format_model_name
from trimtab.engine.openai.routing import ShadowTraffic, TrafficSplit
from trimtab.engine.openai.score import score_given_answer
from trimtab.engine.prefixes.catalog import LoadedVersion, VersionCatalog
from trimtab.engine.prefixes.slots import PrefixSlots
from trimtab.errors import NotFoundError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer

STEERED_PATHS = ("/v1/chat/completions", "/v1/completions")
SCORE_PATH = "/v1/score"
MAX_ANSWERS = 128


def _check_answer_count(request: dict[str, Any]) -> None:
    """UsageError where one request asks for more answers than OpenAI's own API gives: each takes room in the engine."""
    count = request.get("n")
    if isinstance(count, int | None) and (count or 1) * count_prompts(request) > MAX_ANSWERS:
        raise UsageError(f"a request may ask for {MAX_ANSWERS} answers at most, n times its prompts")


class RequestHandler:
    """Answers requests for `base` by `app`, vLLM's own server of `engine`. `traffic` may be replaced at any time."""

    def __init__(
        self,
        engine: Any,
        app: App,
        base: BaseModel,
        renderer: ChatRenderer,
        prefixes: VersionCatalog[Prefix],
        watchers: DetectorSelector,
        residents: PrefixSlots,
    ) -> None:
        self.traffic = TrafficSplit()
        self._engine = engine
        self._app = app
        self._base = base
        self._renderer = renderer
        self._prefixes = prefixes
        self._watchers = watchers
        self._residents = residents
        self._shadows = ShadowTraffic(prefixes, residents, self._forward)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that a prefix may steer and a detector may watch."""
        now: Steering | None = None
        send = told = asgi.StatusRecorder(send)
        try:
            body = await asgi.read_body(receive)
            if body is None:
                return
            request = asgi.parse_body(body)
            wished = parse_options(request.pop("trimtab", None))
            _check_answer_count(request)
            loaded = await self._find_prefix(request, scope["path"])
            watched = await self._watchers.select_detector(wished, loaded and loaded.artifact, request)
            async with self._residents.lease_slots(loaded) as now:
                asgi.annotate_request(scope, model=format_model_name(self._base.name, now))
                if scope["path"].rstrip("/") == SCORE_PATH:
                    await self._answer_score_request(request, now, watched, send)
                elif wished.policy == "annotate":
                    if now and (alias := self.traffic.shadow.get(now.name)):
                        self._shadows.start(request, now.name, alias, watched, scope)
                    await self._forward(request, now, watched, scope, receive, send)
                else:
                    check_policy(wished, request, watched)

                    async def ask(changed: dict[str, Any]) -> PolicyReply:
                        collected, fresh = ResponseBuffer(), watched.copy_settings()
                        await self._forward(changed, now, fresh, scope, receive, collected)
                        return PolicyReply(collected.status, collected.headers, collected.body, fresh)

                    reply = await apply_policy(ask, wished, request)
                    await asgi.send_response(send, reply.status, reply.headers, reply.body)
        except TrimtabError as error:
            await asgi.send_error(send, error)
        except RecursionError:
            await asgi.send_error(send, UsageError("the request is nested too deeply"))
        finally:
            REQUESTS.labels(*request_labels(now), str(told.status)).inc()

    async def _forward(
        self, request: dict[str, Any], now: Steering | None, watched: RequestRisk, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let vLLM answer, steered and watched."""
        replayed = BufferedRequest(scope, receive, self._rewrite_request(request, now, scope["path"]))
        steering.set(now)
        current_risk.set(watched)
        await self._app(replayed.scope, replayed.receive, ResponseRewriter(send, self._base.name, now, watched))
        asgi.annotate_request(scope, tokens=watched.tokens, detector=watched.label, risk=watched.risks.get(0))

    async def _answer_score_request(
        self, request: dict[str, Any], now: Steering | None, watched: RequestRisk, send: Send
    ) -> None:
        tokens = 0
        if watched.detector is not None:
            steering.set(now)
            current_risk.set(watched)
            tokens = await score_given_answer(self._engine, self._renderer, request, now, watched)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        scored = {
            "object": "score",
            "model": format_model_name(self._base.name, now),
            "usage": usage,
            "trimtab": build_trimtab_field(now, watched),
        }
        await asgi.send_json(send, 200, scored)

    async def _find_prefix(self, request: dict[str, Any], path: str) -> LoadedVersion[Prefix] | None:
        """The version that `model` names; None for the base model and for names that vLLM is to judge. Raises NotFoundError
        for a name of nothing, where vLLM is not asked."""
        model = request.get("model")
        if not isinstance(model, str) or not model.startswith(f"{self._base.name}:"):
            if path.rstrip("/") == SCORE_PATH and model not in (None, self._base.name):
                raise NotFoundError(f"no model {str(model)[:80]!r}; there is {self._base.name}, and its prefixes")
            return None
        name, _, ref = model[len(self._base.name) + 1 :].partition("@")
        user = request.get("user")
        if not ref and (alias := self.traffic.select_alias(name, user if isinstance(user, str) else None)):
            # An alias that is not set has no share.
            with suppress(NotFoundError):
                return await self._prefixes.find(name, alias)
        return await self._prefixes.find(name, ref or None)

    def _rewrite_request(self, request: dict[str, Any], now: Steering | None, path: str) -> bytes:
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
                changed["messages"] = self._renderer.insert_row_tokens(messages, now.place, now.rows)
            elif not chats:
                raise UsageError(
                    f"prefix {now.name!r} goes into the {now.place} of a chat: use /v1/chat/completions (plain completions "
                    "take prefixes of place start)"
                )
        return json.dumps(changed).encode()

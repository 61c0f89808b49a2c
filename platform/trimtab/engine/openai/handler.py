"""Handler of steered requests: selects prefix and detector, forwards to vLLM, and annotates the response."""

import json
from contextlib import suppress
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine import asgi
from trimtab.engine.asgi import App, BufferedRequest, Receive, ResponseBuffer, Scope, Send
from trimtab.engine.context import Steering
from trimtab.engine.context import steering as steering_variable
from trimtab.engine.detectors.policy import PolicyReply, apply_policy, check_policy, count_prompts
from trimtab.engine.detectors.request_risk import DetectorSelector, RequestRisk, current_risk
from trimtab.engine.extensions import coerce_request, parse_options
from trimtab.engine.metrics import REQUESTS, request_labels
from trimtab.engine.openai.response_rewriter import ResponseRewriter, build_trimtab_field, format_model_name
from trimtab.engine.openai.score import score_given_answer
from trimtab.engine.openai.shadow_traffic import ShadowTraffic
from trimtab.engine.openai.traffic_split import TrafficSplit
from trimtab.engine.prefixes.catalog import LoadedVersion, VersionCatalog
from trimtab.engine.prefixes.slots import PrefixSlots
from trimtab.engine.request_context import RequestContext
from trimtab.errors import NotFoundError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer
from trimtab.util.identifiers import split_reference

STEERED_PATHS = ("/v1/chat/completions", "/v1/completions")
SCORE_PATH = "/v1/score"
MAX_ANSWERS = 128


def _check_answer_count(request: dict[str, Any]) -> None:
    """Limit the answers of a request to the limit of OpenAI's API, since each occupies memory of the engine."""
    count = request.get("n")
    if isinstance(count, int | None) and (count or 1) * count_prompts(request) > MAX_ANSWERS:
        raise UsageError(f"a request may ask for at most {MAX_ANSWERS} answers: n times the number of prompts")


def describe_risk(risk: RequestRisk) -> dict[str, Any]:
    """Return the fields of the access log's record about the answers of a request."""
    return {"tokens": risk.tokens, "detector": risk.label, "risk": risk.risks.get(0)}


class RequestHandler:
    """ASGI handler of requests that a prefix can steer and a detector can check.

    Args:
        engine: vLLM's engine.
        app: vLLM's ASGI app of the engine.
        base: base model of the engine.
        renderer: chat renderer of the base model.
        prefixes: catalog of prefixes.
        detectors: selector of detectors.
        slots: slots of the engine.

    Attributes:
        traffic: traffic split; may be replaced at any time.
    """

    def __init__(
        self,
        engine: Any,
        app: App,
        base: BaseModel,
        renderer: ChatRenderer,
        prefixes: VersionCatalog[Prefix],
        detectors: DetectorSelector,
        slots: PrefixSlots,
    ) -> None:
        self.traffic = TrafficSplit()
        self._engine = engine
        self._app = app
        self._base = base
        self._renderer = renderer
        self._prefixes = prefixes
        self._detectors = detectors
        self._slots = slots
        self._shadows = ShadowTraffic(prefixes, slots, self._forward)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        steering: Steering | None = None
        context = RequestContext.get(scope, receive, send)
        try:
            parsed = await context.read_json()
            if parsed is None:
                return
            request = coerce_request({key: value for key, value in parsed.items() if key != "trimtab"})
            options = parse_options(parsed.get("trimtab"))
            _check_answer_count(request)
            loaded = await self._find_prefix(request, scope["path"])
            risk = await self._detectors.select_detector(options, loaded and loaded.artifact, request)
            async with self._slots.lease_slots(loaded) as steering:
                context.notes["model"] = format_model_name(self._base.name, steering)
                if scope["path"].rstrip("/") == SCORE_PATH:
                    await self._answer_score_request(request, steering, risk, context.send)
                elif options.policy == "annotate":
                    if steering and (alias := self.traffic.shadow.get(steering.name)):
                        self._shadows.start(request, steering.name, alias, risk, scope)
                    await self._forward(request, steering, risk, scope, context.receive, context.send)
                    context.notes |= describe_risk(risk)
                else:
                    check_policy(options, request, risk)

                    async def ask(changed: dict[str, Any]) -> PolicyReply:
                        response, new_risk = ResponseBuffer(), risk.copy_settings()
                        await self._forward(changed, steering, new_risk, scope, context.receive, response)
                        context.notes |= describe_risk(new_risk)
                        return PolicyReply(response.status, response.headers, response.body, new_risk)

                    reply = await apply_policy(ask, options, request)
                    await asgi.send_response(context.send, reply.status, reply.headers, reply.body)
        except TrimtabError as error:
            await asgi.send_error(context.send, error)
        except RecursionError:
            await asgi.send_error(context.send, UsageError("the request is nested too deeply"))
        finally:
            REQUESTS.labels(*request_labels(steering), str(context.status)).inc()

    async def _forward(
        self, request: dict[str, Any], steering: Steering | None, risk: RequestRisk, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Forward a request to vLLM with its prefix and detector."""
        replayed = BufferedRequest(scope, receive, self._rewrite_request(request, steering, scope["path"]))
        steering_variable.set(steering)
        current_risk.set(risk)
        await self._app(replayed.scope, replayed.receive, ResponseRewriter(send, self._base.name, steering, risk))

    async def _answer_score_request(
        self, request: dict[str, Any], steering: Steering | None, risk: RequestRisk, send: Send
    ) -> None:
        tokens = 0
        if risk.detector is not None:
            steering_variable.set(steering)
            current_risk.set(risk)
            tokens = await score_given_answer(self._engine, self._renderer, request, steering, risk)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        response = {
            "object": "score",
            "model": format_model_name(self._base.name, steering),
            "usage": usage,
            "trimtab": build_trimtab_field(steering, risk),
        }
        await asgi.send_json(send, 200, response)

    async def _find_prefix(self, request: dict[str, Any], path: str) -> LoadedVersion[Prefix] | None:
        """Find the version that `model` names.

        Returns None for the base model. Also returns None for other names, which vLLM checks. Score requests do not reach vLLM,
        so that their names are checked here.
        """
        model = request.get("model")
        if not isinstance(model, str) or not model.startswith(f"{self._base.name}:"):
            if path.rstrip("/") == SCORE_PATH and model not in (None, self._base.name):
                raise NotFoundError(f"no model {str(model)[:80]!r}; this server has {self._base.name} and its prefixes")
            return None
        name, ref = split_reference(model[len(self._base.name) + 1 :])
        user = request.get("user")
        if not ref and (alias := self.traffic.select_alias(name, user if isinstance(user, str) else None)):
            # An alias without a version gets no traffic: the champion answers instead.
            with suppress(NotFoundError):
                return await self._prefixes.find(name, alias)
        return await self._prefixes.find(name, ref)

    def _rewrite_request(self, request: dict[str, Any], steering: Steering | None, path: str) -> bytes:
        """Return the request body for vLLM. Raise UsageError if the prefix cannot be placed in it."""
        if steering is None:
            return json.dumps(request).encode()
        changed = request | {"model": self._base.name}
        if steering.position != "start":
            messages = request.get("messages")
            if messages == []:
                raise UsageError("messages must contain at least one message")
            chats = path.rstrip("/").endswith("/chat/completions")
            if chats and isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
                changed["messages"] = self._renderer.insert_slot_tokens(messages, steering.position, steering.slots)
            elif not chats:
                raise UsageError(
                    f"prefix {steering.name!r} has position {steering.position}, which needs a chat. Use "
                    "/v1/chat/completions, or a prefix of position start"
                )
        return json.dumps(changed).encode()

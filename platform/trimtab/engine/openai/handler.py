"""Handler of steered requests: selects prefix and detector, forwards to vLLM, and annotates the response."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine import asgi
from trimtab.engine.asgi import App, BufferedRequest, Receive, ResponseBuffer, Scope, Send
from trimtab.engine.context import Steering
from trimtab.engine.context import steering as steering_variable
from trimtab.engine.detectors.answer_verdicts import AnswerVerdicts
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.detectors.request_risk import DetectorSelector, RequestRisk, current_risk
from trimtab.engine.detectors.worker_detectors import WorkerDetectors
from trimtab.engine.extensions import RequestOptions, coerce_request, parse_options
from trimtab.engine.metrics import REQUESTS, request_labels
from trimtab.engine.openai.moderations import (
    MODERATION_FIELDS,
    MODERATIONS_PATH,
    build_moderation_response,
    moderate_inputs,
)
from trimtab.engine.openai.policy import PolicyReply, apply_policies, check_retry
from trimtab.engine.openai.policy_resolver import PolicyResolver, resolve_own_policy
from trimtab.engine.openai.request_fields import SCORE_FIELDS
from trimtab.engine.openai.response_rewriter import ResponseRewriter, RouteGate
from trimtab.engine.openai.score import score_supplied_answer
from trimtab.engine.openai.shadow_traffic import ShadowTraffic
from trimtab.engine.openai.traffic_split import TrafficSplit
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.slots import PrefixSlots
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.engine.protocols.errors import send_error
from trimtab.engine.protocols.messages import CountTokensProtocol
from trimtab.engine.protocols.paths import CHAT_PATH, COUNT_PATH, PROTOCOLS
from trimtab.engine.protocols.protocol import Annotation, Protocol
from trimtab.engine.recording import RecordedAnswer, RecordedPrompt, SignalSink
from trimtab.engine.request_context import RequestContext
from trimtab.engine.vllm_ext.grammars import GRAMMAR_FIELDS, check_grammar
from trimtab.errors import NotFoundError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import ChatRenderer
from trimtab.types import Subject
from trimtab.util.identifiers import split_reference

SCORE_PATH = "/v1/score"
# Fields of the endpoints that trimtab answers itself.
OWN_FIELDS = {SCORE_PATH: SCORE_FIELDS, MODERATIONS_PATH: MODERATION_FIELDS}


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
        policies: resolver of policies.
        worker_detectors: detectors in the engine's workers.
        fields: names of the fields that an endpoint reads, by path; other fields are dropped.
        sink: sink of the answers' signals; None to store none.

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
        policies: PolicyResolver,
        worker_detectors: WorkerDetectors,
        fields: Mapping[str, frozenset[str]],
        sink: SignalSink | None = None,
    ) -> None:
        self.traffic = TrafficSplit()
        self._engine = engine
        self._app = app
        self._base = base
        self._renderer = renderer
        self._prefixes = prefixes
        self._detectors = detectors
        self._slots = slots
        self._policies = policies
        self._worker_detectors = worker_detectors
        self._fields = {**OWN_FIELDS, **fields}
        self._sink = sink
        self._shadows = ShadowTraffic(prefixes, slots, self._forward)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        answered: Steering | None = None
        context, path = RequestContext.get(scope, receive, send), scope["path"].rstrip("/")
        try:
            # vLLM checks this for its own paths.
            if path in OWN_FIELDS:
                asgi.check_json_type(scope)
            parsed = await context.read_json()
            if parsed is None:
                return
            options = parse_options(parsed.get("trimtab"))
            request = coerce_request({key: value for key, value in parsed.items() if key != "trimtab"})
            if path in PROTOCOLS:
                request = PROTOCOLS[path].prepare_request(request)
            request = self._select_fields(request, path)
            del parsed
            context.release_body()
            loaded = await self._find_prefix(request, path)
            if path == COUNT_PATH:
                await self._count_tokens(request, loaded, scope, context)
                return
            if path == MODERATIONS_PATH:
                await self._moderate(request, options, loaded, context)
                return
            if path == SCORE_PATH:
                answered = await self._answer_score_request(request, options, loaded, context)
                return
            resolving = self._policies.resolve(context.rights, options.policies, loaded, request, self._find_model)
            verdicts, answers = await resolving
            first = None if verdicts.reads_plain else loaded
            risk = await self._select_risk(options, first, request, verdicts, answers)
            risk.stored = self._select_stored(request, context)
            checking = self._worker_detectors.lease(risk.list_worker_detectors())
            async with self._slots.lease_slots(first) as steering, checking:
                context.notes["model"] = Annotation(self._base.name, steering, risk).model
                answered = steering
                if not risk.answers.needs_complete_answer:
                    if loaded and (alias := self.traffic.shadow.get(loaded.version.name)):
                        self._shadows.start(request, loaded.version.name, alias, risk, scope)
                    answered, risk = await self._answer(request, options, steering, risk, scope, context, context.send)
                    self._record(risk, answered, context)
                else:
                    check_retry(risk.answers, request)

                    async def forward(changed: dict[str, Any]) -> PolicyReply:
                        nonlocal answered
                        response, new_risk = ResponseBuffer(), risk.copy_settings()
                        answered, new_risk = await self._answer(changed, options, steering, new_risk, scope, context, response)
                        return PolicyReply(response.status, response.headers, response.body, new_risk)

                    reply = await apply_policies(forward, risk.answers, request, PROTOCOLS[path])
                    await asgi.send_response(context.send, reply.status, reply.headers, reply.body)
                    self._record(reply.watch, answered, context)
        except TrimtabError as error:
            await send_error(context.send, path, error)
        except RecursionError:
            await send_error(context.send, path, UsageError("the request is nested too deeply"))
        finally:
            REQUESTS.labels(*request_labels(answered), str(context.status)).inc()

    async def _answer(
        self,
        request: dict[str, Any],
        options: RequestOptions,
        steering: Steering | None,
        risk: RequestRisk,
        scope: Scope,
        context: RequestContext,
        send: Send,
    ) -> tuple[Steering | None, RequestRisk]:
        """Answer a request with its model, or with the model that a policy routes it to.

        Returns:
            Prefix and detectors of the answer.
        """
        await self._forward(request, steering, risk, scope, context.receive, send)
        if (route := risk.verdicts.route) is not None:
            loaded = await self._find_model(route.policy.model)
            routed = await self._select_risk(options, loaded, request, risk.verdicts.close(), risk.requested)
            routed.stored, routed.prompt = risk.stored, risk.prompt
            checking = self._worker_detectors.lease(routed.list_worker_detectors())
            async with self._slots.lease_slots(loaded) as steering, checking:
                context.notes["model"] = Annotation(self._base.name, steering, routed).model
                await self._forward(request, steering, routed, scope, context.receive, send)
            risk = routed
        context.notes |= risk.as_notes()
        return steering, risk

    def _select_stored(self, request: Mapping[str, Any], context: RequestContext) -> Collection[Subject]:
        """Return which signals of a request are stored. Most answers of a beam search are not returned."""
        if self._sink is None or request.get("use_beam_search") or not self._sink.is_sampled(context.server_id):
            return ()
        return self._sink.subjects

    def _record(self, risk: RequestRisk, steering: Steering | None, context: RequestContext) -> None:
        """Pass the signals of the prompt and the answers to the sink, if the request is sampled."""
        if self._sink is None:
            return
        model, digest = Annotation(self._base.name, steering, risk).model, steering and steering.digest
        key = context.notes.get("key")
        if risk.prompt is not None:
            self._sink(RecordedPrompt(context.server_id, key, model, risk.prompt))
        for choice, answer in risk.recorded.items():
            value = risk.risks.get(choice)
            self._sink(RecordedAnswer(context.server_id, choice, key, model, digest, risk.label, value, answer))

    async def _select_risk(
        self,
        options: RequestOptions,
        loaded: LoadedVersion[Prefix] | None,
        request: dict[str, Any],
        verdicts: PromptVerdicts,
        answers: AnswerVerdicts,
    ) -> RequestRisk:
        """Select the detector of a request, and add the policy that the request sets for it.

        Args:
            options: options of the request.
            loaded: prefix of the request; None for the plain base model.
            request: request body.
            verdicts: policies on the prompts.
            answers: policies on the answers.
        """
        risk = await self._detectors.select_detector(options, loaded and loaded.artifact, request)
        own = resolve_own_policy(options, risk)
        risk.verdicts, risk.requested = verdicts, answers
        risk.answers = answers.copy_policies() if own is None else answers.add_policy(own)
        return risk

    async def _forward(
        self, request: dict[str, Any], steering: Steering | None, risk: RequestRisk, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Forward a request to vLLM with its prefix and detector; drop the response if a policy routes the request."""
        protocol = PROTOCOLS[scope["path"].rstrip("/")]
        _check_position(protocol, steering)
        steering_variable.set(steering)
        current_risk.set(risk)
        replayed = BufferedRequest(scope, receive, self._encode_request(request))
        rewriter = ResponseRewriter(send, protocol, Annotation(self._base.name, steering, risk))
        gate = RouteGate(rewriter, risk)
        # Each token of a stream passes here.
        await self._app(replayed.scope, replayed.receive, rewriter if gate.is_open else gate)
        await gate.end()

    async def _count_tokens(
        self, request: dict[str, Any], loaded: LoadedVersion[Prefix] | None, scope: Scope, context: RequestContext
    ) -> None:
        """Forward a request that renders its messages only. Any slots will do, so that none are leased."""
        steering = None
        if loaded is not None:
            count = len(loaded.artifact.vectors)
            slots = tuple(range(self._renderer.first_slot, self._renderer.first_slot + count))
            steering = Steering(loaded.version.name, loaded.version.version, None, loaded.artifact.card.position, slots, "")
        steering_variable.set(steering)
        replayed = BufferedRequest(scope, context.receive, self._encode_request(request))
        rewriter = ResponseRewriter(context.send, CountTokensProtocol(), Annotation(self._base.name, steering, RequestRisk()))
        await self._app(replayed.scope, replayed.receive, rewriter)

    async def _moderate(
        self,
        request: dict[str, Any],
        options: RequestOptions,
        loaded: LoadedVersion[Prefix] | None,
        context: RequestContext,
    ) -> None:
        """Answer a moderation request with the detectors that it names, or with all champions."""
        if loaded is not None:
            raise UsageError(f"moderations use the plain base model. Send model {self._base.name}")
        verdicts = await self._policies.select_detectors(options.policies)
        verdicts.digits = context.rights.digits
        steering_variable.set(None)
        async with self._worker_detectors.lease(verdicts.list_detectors()):
            tokens = await moderate_inputs(self._engine, self._renderer, request, verdicts)
        await asgi.send_json(context.send, 200, build_moderation_response(self._base.name, verdicts, tokens))

    async def _answer_score_request(
        self,
        request: dict[str, Any],
        options: RequestOptions,
        loaded: LoadedVersion[Prefix] | None,
        context: RequestContext,
    ) -> Steering | None:
        """Answer a request that scores a supplied answer; return its prefix."""
        if options.policies:
            raise UsageError(f"trimtab.policies checks requests that the model answers, not those of {SCORE_PATH}")
        risk = await self._detectors.select_detector(options, loaded and loaded.artifact, request)
        tokens = 0
        async with self._slots.lease_slots(loaded) as steering:
            annotation = Annotation(self._base.name, steering, risk)
            context.notes["model"] = annotation.model
            if risk.detector is not None:
                steering_variable.set(steering)
                current_risk.set(risk)
                tokens = await score_supplied_answer(self._engine, self._renderer, request, steering, risk)
            response = {
                "object": "score",
                "model": annotation.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "trimtab": annotation.build_field(),
            }
            await asgi.send_json(context.send, 200, response)
        return steering

    async def _find_model(self, model: str | None) -> LoadedVersion[Prefix] | None:
        """Find the version that a policy names; None for the base model. Raise NotFoundError for other names."""
        return await self._find_prefix({"model": model}, SCORE_PATH)

    async def _find_prefix(self, request: dict[str, Any], path: str) -> LoadedVersion[Prefix] | None:
        """Find the version that `model` names.

        Returns None for the base model. Also returns None for other names, which vLLM checks. Score requests do not reach vLLM,
        so that their names are checked here.
        """
        model = request.get("model")
        if not isinstance(model, str) or not model.startswith(f"{self._base.name}:"):
            if path in OWN_FIELDS and model not in (None, self._base.name):
                raise NotFoundError(f"no model {str(model)[:80]!r}; this server has {self._base.name} and its prefixes")
            return None
        name, ref = split_reference(model[len(self._base.name) + 1 :])
        user = PROTOCOLS[path].get_user(request) if path in PROTOCOLS else None
        if not ref and (alias := self.traffic.select_alias(name, user)):
            # An alias without a version gets no traffic: the champion answers instead.
            with suppress(NotFoundError):
                return await self._prefixes.find(name, alias)
        return await self._prefixes.find(name, ref)

    def _select_fields(self, request: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Return the fields that the endpoint reads, with a schema or grammar of limited size."""
        check_grammar({name: request[name] for name in GRAMMAR_FIELDS if request.get(name)})
        fields = self._fields.get(path, request.keys())
        return {key: value for key, value in request.items() if key in fields}

    def _encode_request(self, request: dict[str, Any]) -> bytes:
        """Encode a request with the name of the base model in the place of that of a prefix."""
        model = request.get("model")
        steered = isinstance(model, str) and model.startswith(f"{self._base.name}:")
        return asgi.dump_json(request | {"model": self._base.name} if steered else request)


def _check_position(protocol: Protocol, steering: Steering | None) -> None:
    """Raise UsageError if a prefix needs a conversation and the request is none."""
    if steering is not None and steering.position != "start" and not protocol.has_messages:
        raise UsageError(
            f"prefix {steering.name!r} has position {steering.position}, which needs a chat. Use {CHAT_PATH}, or a prefix of "
            "position start"
        )

"""Policies for risky answers: withholding and retrying."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.protocols.completions import count_prompts
from trimtab.engine.protocols.protocol import Protocol
from trimtab.errors import UsageError

# A greedy retry would repeat the same answer.
RETRY_TEMPERATURE = 0.7
TOKEN_COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"}


@dataclass(frozen=True)
class PolicyReply:
    """A complete response.

    Attributes:
        status: HTTP status.
        headers: HTTP headers.
        body: response body.
        watch: detector and risks of the answers.
    """

    status: int
    headers: Headers
    body: bytes
    watch: RequestRisk


AskModel = Callable[[dict[str, Any]], Awaitable[PolicyReply]]
"""Forwards a request body to the model, and returns the complete response."""


def check_policy(options: RequestOptions, request: dict[str, Any], risk: RequestRisk) -> None:
    """Check that the policy of a request can be applied.

    Args:
        options: options of the request.
        request: request body.
        risk: detector of the request.

    Raises:
        UsageError: if the request has no detector, or `retry` is combined with several answers.
    """
    if risk.detector is None:
        raise UsageError(f"trimtab.policy {options.policy} needs a detector: {risk.reason}")
    if options.policy == "retry" and ((request.get("n") or 1) != 1 or count_prompts(request) > 1):
        raise UsageError("trimtab.policy retry returns one answer. Send one prompt with n=1")


async def apply_policy(ask: AskModel, options: RequestOptions, request: dict[str, Any], protocol: Protocol) -> PolicyReply:
    """Answer a request under its policy: retry or withhold risky answers.

    A streamed answer cannot be withdrawn. Therefore a request with `stream` receives its answer as a stream after the answer is
    complete.

    Args:
        ask: forwards a request body to the model.
        options: options of the request.
        request: request body.
        protocol: protocol of the request.

    Returns:
        The response to send, with status and headers.
    """
    stream_options = request.get("stream_options")
    streams = request.get("stream") is True
    unstreamed = {key: value for key, value in request.items() if key != "stream_options"} | {"stream": False}
    reply = await _select_reply(ask, options, unstreamed if streams else request, protocol)
    if not streams or reply.status != HTTPStatus.OK:
        return reply
    usage = isinstance(stream_options, dict) and stream_options.get("include_usage") is True
    data = protocol.build_stream(asgi.parse_body(reply.body), usage=usage)
    headers = asgi.set_header(reply.headers, b"content-type", b"text/event-stream; charset=utf-8")
    return PolicyReply(reply.status, asgi.set_content_length(headers, data), data, reply.watch)


async def _select_reply(ask: AskModel, options: RequestOptions, request: dict[str, Any], protocol: Protocol) -> PolicyReply:
    if options.policy == "retry":
        return await _select_least_risky(ask, options, request)
    reply = await ask(request)
    if reply.status != HTTPStatus.OK:
        return reply
    body = asgi.parse_body(reply.body)
    risky = {index: options.refusal_text for index in range(reply.watch.choices) if _is_risky(reply.watch, index, options)}
    # An answer to a refused prompt is withheld already.
    protocol.withhold_answers(body, {i: text for i, text in risky.items() if i not in reply.watch.verdicts.refusals})
    return _replace_body(reply, body)


async def _select_least_risky(ask: AskModel, options: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    replies: list[PolicyReply] = []
    for number in range(options.max_attempts):
        replies.append(await ask(request if number == 0 else _vary_request(request, number)))
        watch = replies[-1].watch
        if replies[-1].status != HTTPStatus.OK or watch.verdicts.refusals or not _is_risky(watch, 0, options):
            break
    answered = [reply for reply in replies if reply.status == HTTPStatus.OK]
    if not answered:
        return replies[-1]
    best = min(answered, key=lambda reply: reply.watch.risks.get(0, 1.0))
    body = asgi.parse_body(best.body)
    body["trimtab"]["attempts"] = len(replies)
    # The usage counts the tokens of all attempts.
    usages = [asgi.parse_body(reply.body)["usage"] for reply in answered]
    body["usage"] |= {key: sum(usage[key] for usage in usages) for key in TOKEN_COUNTS & body["usage"].keys()}
    return _replace_body(best, body)


def _is_risky(risk: RequestRisk, index: int, options: RequestOptions) -> bool:
    """Return whether the risk of a choice is above the limit of the policy, or unknown."""
    limit = risk.threshold if options.risk_threshold is None else options.risk_threshold
    value = risk.risks.get(index)
    # Negated, so that NaN counts as risky.
    return value is None or limit is None or not value <= limit


def _vary_request(request: dict[str, Any], number: int) -> dict[str, Any]:
    temperature, seed = request.get("temperature"), request.get("seed")
    changed = {"temperature": RETRY_TEMPERATURE} if temperature == 0 else {}
    return request | changed | ({"seed": seed + number} if isinstance(seed, int) else {})


def _replace_body(reply: PolicyReply, body: dict[str, Any]) -> PolicyReply:
    data = asgi.dump_json(body)
    return PolicyReply(reply.status, asgi.set_content_length(reply.headers, data), data, reply.watch)

"""Policies for risky answers: withholding and retrying."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers
from trimtab.engine.detectors.answer_verdicts import AnswerVerdicts
from trimtab.engine.detectors.request_risk import RequestRisk
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


ForwardRequest = Callable[[dict[str, Any]], Awaitable[PolicyReply]]
"""Forwards a request body to the model, and returns the complete response."""


def check_retry(answers: AnswerVerdicts, request: dict[str, Any]) -> None:
    """Raise UsageError if a policy retries the answers to a request with several of them."""
    if answers.can_retry and ((request.get("n") or 1) != 1 or count_prompts(request) > 1):
        raise UsageError("a policy with action retry returns one answer. Send one prompt with n=1")


async def apply_policies(
    forward: ForwardRequest, answers: AnswerVerdicts, request: dict[str, Any], protocol: Protocol
) -> PolicyReply:
    """Answer a request under policies on its answers: retry or withhold risky answers.

    A streamed answer cannot be withdrawn. Therefore a request with `stream` receives its answer as a stream after the answer is
    complete.

    Args:
        forward: forwards a request body to the model.
        answers: policies on the answers.
        request: request body.
        protocol: protocol of the request.

    Returns:
        The response to send, with status and headers.
    """
    stream_options = request.get("stream_options")
    streams = request.get("stream") is True
    unstreamed = {key: value for key, value in request.items() if key != "stream_options"} | {"stream": False}
    reply = await _select_reply(forward, answers, unstreamed if streams else request)
    if reply.status != HTTPStatus.OK:
        return reply
    body = asgi.parse_body(reply.body)
    if answers.can_refuse:
        risky = reply.watch.answers.find_refusals(reply.watch.choices)
        # An answer to a refused prompt is withheld already.
        protocol.withhold_answers(body, {i: text for i, text in risky.items() if i not in reply.watch.verdicts.refusals})
    if not streams:
        return _replace_body(reply, body)
    usage = isinstance(stream_options, dict) and stream_options.get("include_usage") is True
    data = protocol.build_stream(body, usage=usage)
    headers = asgi.set_header(reply.headers, b"content-type", b"text/event-stream; charset=utf-8")
    return PolicyReply(reply.status, asgi.set_content_length(headers, data), data, reply.watch)


async def _select_reply(forward: ForwardRequest, answers: AnswerVerdicts, request: dict[str, Any]) -> PolicyReply:
    """Return the answer, or the least risky one of several if a policy retries."""
    if not answers.can_retry:
        return await forward(request)
    replies: list[PolicyReply] = []
    for number in range(answers.max_attempts):
        replies.append(await forward(request if number == 0 else _vary_request(request, number)))
        watch = replies[-1].watch
        if replies[-1].status != HTTPStatus.OK or watch.verdicts.refusals or not watch.answers.is_risky(0):
            break
    answered = [reply for reply in replies if reply.status == HTTPStatus.OK]
    if not answered:
        return replies[-1]
    best = min(answered, key=lambda reply: reply.watch.answers.rank_choice(0))
    body = asgi.parse_body(best.body)
    body["trimtab"]["attempts"] = len(replies)
    # The usage counts the tokens of all attempts.
    usages = [asgi.parse_body(reply.body)["usage"] for reply in answered]
    body["usage"] |= {key: sum(usage[key] for usage in usages) for key in TOKEN_COUNTS & body["usage"].keys()}
    return _replace_body(best, body)


def _vary_request(request: dict[str, Any], number: int) -> dict[str, Any]:
    temperature, seed = request.get("temperature"), request.get("seed")
    changed = {"temperature": RETRY_TEMPERATURE} if temperature == 0 else {}
    return request | changed | ({"seed": seed + number} if isinstance(seed, int) else {})


def _replace_body(reply: PolicyReply, body: dict[str, Any]) -> PolicyReply:
    data = asgi.dump_json(body)
    return PolicyReply(reply.status, asgi.set_content_length(reply.headers, data), data, reply.watch)

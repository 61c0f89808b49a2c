"""Policies for risky answers: withholding and retrying."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.extensions import RequestOptions
from trimtab.errors import UsageError

# A greedy retry would repeat the same answer.
RETRY_TEMPERATURE = 0.7


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


def count_prompts(request: dict[str, Any]) -> int:
    """Return the number of prompts of a request. A list holds several prompts, or the token ids of one."""
    prompt = request.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


async def apply_policy(ask: AskModel, options: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    """Answer a request under its policy: retry or withhold risky answers.

    A streamed answer cannot be withdrawn. Therefore a request with `stream` receives its answer as a stream after the answer is
    complete.

    Args:
        ask: forwards a request body to the model.
        options: options of the request.
        request: request body.

    Returns:
        The response to send, with status and headers.
    """
    stream_options = request.get("stream_options")
    streams = request.get("stream") is True
    unstreamed = {key: value for key, value in request.items() if key != "stream_options"} | {"stream": False}
    reply = await _select_reply(ask, options, unstreamed if streams else request)
    if not streams or reply.status != HTTPStatus.OK:
        return reply
    return _as_stream(reply, usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True)


async def _select_reply(ask: AskModel, options: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    if options.policy == "retry":
        return await _select_least_risky(ask, options, request)
    reply = await ask(request)
    return reply if reply.status != HTTPStatus.OK else _withhold_choices(reply, options)


def _is_risky(risk: RequestRisk, index: int, above: float | None) -> bool:
    """Return whether a choice's risk is above the limit or unknown."""
    limit = risk.threshold if above is None else above
    value = risk.risks.get(index)
    return value is None or limit is None or value > limit


def _withhold_choices(reply: PolicyReply, options: RequestOptions) -> PolicyReply:
    body = asgi.parse_body(reply.body)
    for choice in body["choices"]:
        withheld = _is_risky(reply.watch, choice["index"], options.risk_threshold)
        choice.setdefault("trimtab", {})["withheld"] = withheld
        if not withheld:
            continue
        choice |= {"finish_reason": "content_filter", "logprobs": None}
        if "message" in choice:
            choice["message"] = {"role": "assistant", "content": options.refusal_text}
        else:
            choice["text"] = options.refusal_text
    return _replace_choices(reply, body)


async def _select_least_risky(ask: AskModel, options: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    replies: list[PolicyReply] = []
    for number in range(options.max_attempts):
        replies.append(await ask(request if number == 0 else _vary_request(request, number)))
        if replies[-1].status != HTTPStatus.OK or not _is_risky(replies[-1].watch, 0, options.risk_threshold):
            break
    answered = [reply for reply in replies if reply.status == HTTPStatus.OK]
    if not answered:
        return replies[-1]
    best = min(answered, key=lambda reply: reply.watch.risks.get(0, 1.0))
    body = asgi.parse_body(best.body)
    body["trimtab"]["attempts"] = len(replies)
    # The usage counts the tokens of all attempts.
    usages = [asgi.parse_body(reply.body)["usage"] for reply in answered]
    body["usage"] |= {
        key: sum(usage[key] for usage in usages) for key in ("completion_tokens", "total_tokens", "prompt_tokens")
    }
    return _replace_choices(best, body)


def _vary_request(request: dict[str, Any], number: int) -> dict[str, Any]:
    temperature, seed = request.get("temperature"), request.get("seed")
    changed = {"temperature": RETRY_TEMPERATURE} if temperature == 0 else {}
    return request | changed | ({"seed": seed + number} if isinstance(seed, int) else {})


def _replace_choices(reply: PolicyReply, body: dict[str, Any]) -> PolicyReply:
    data = asgi.dump_json(body)
    return PolicyReply(reply.status, asgi.set_content_length(reply.headers, data), data, reply.watch)


def _as_stream(reply: PolicyReply, *, usage: bool) -> PolicyReply:
    """Convert a complete response to a stream: two chunks per choice, its content and its end, and a usage chunk if wanted."""
    body = asgi.parse_body(reply.body)
    common = {key: body[key] for key in ("id", "created", "model")}
    common["object"] = "chat.completion.chunk" if body["object"] == "chat.completion" else body["object"]
    chunks: list[dict[str, Any]] = []
    for choice in body["choices"]:
        content = {"index": choice["index"], "logprobs": choice["logprobs"], "finish_reason": None}
        if "message" in choice:
            delta = {key: value for key, value in choice["message"].items() if value is not None and value != []}
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
            content["delta"], end = delta, {"delta": {}}
        else:
            content["text"], end = choice["text"], {"text": ""}
        chunks.append({"choices": [content]})
        end |= {key: choice[key] for key in ("index", "finish_reason", "trimtab") if key in choice}
        chunks.append({"choices": [end | {"logprobs": None}], "trimtab": body["trimtab"]})
    if usage:
        chunks.append({"choices": [], "usage": body["usage"], "trimtab": body["trimtab"]})
    data = b"".join(b"data: " + asgi.dump_json(common | chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    headers = asgi.set_header(reply.headers, b"content-type", b"text/event-stream; charset=utf-8")
    return PolicyReply(reply.status, asgi.set_content_length(headers, data), data, reply.watch)

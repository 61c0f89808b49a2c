"""What happens to an answer that a detector finds too risky: withheld, or asked for again."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.extensions import RequestOptions
from trimtab.errors import UsageError

# A greedy answer asked for again would be the same.
RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True)
class PolicyReply:
    """A whole response, and who watched it."""

    status: int
    headers: Headers
    body: bytes
    watch: RequestRisk


AskModel = Callable[[dict[str, Any]], Awaitable[PolicyReply]]
"""Answers a request as a whole."""


def check_policy(wishes: RequestOptions, request: dict[str, Any], watch: RequestRisk) -> None:
    """Raise UsageError for a policy that cannot be held to, so that no answer passes unseen."""
    if watch.detector is None:
        raise UsageError(f"trimtab.policy {wishes.policy} needs a detector: {watch.reason}")
    if wishes.policy == "retry_above" and ((request.get("n") or 1) != 1 or count_prompts(request) > 1):
        raise UsageError("trimtab.policy retry_above chooses one answer: ask with one prompt and n 1")


def count_prompts(request: dict[str, Any]) -> int:
    """How many prompts a request has: a list may be several, or one as token ids."""
    prompt = request.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


async def apply_policy(ask: AskModel, wishes: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    """Ask, and ask again or withhold as the policy says.

    What was streamed cannot be taken back: to a request for a stream the answer that is given is streamed when it is whole.
    """
    options = request.get("stream_options")
    streams = request.get("stream") is True
    whole = {key: value for key, value in request.items() if key != "stream_options"} | {"stream": False}
    reply = await _select_reply(ask, wishes, whole if streams else request)
    if not streams or reply.status != HTTPStatus.OK:
        return reply
    return _as_stream(reply, usage=isinstance(options, dict) and options.get("include_usage") is True)


async def _select_reply(ask: AskModel, wishes: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    if wishes.policy == "retry_above":
        return await _select_least_risky(ask, wishes, request)
    reply = await ask(request)
    return reply if reply.status != HTTPStatus.OK else _withhold_choices(reply, wishes)


def _list_risky_choices(watch: RequestRisk, index: int, above: float | None) -> bool:
    """An answer whose risk is not known counts as risky."""
    limit = watch.threshold if above is None else above
    risk = watch.risks.get(index)
    return risk is None or limit is None or risk > limit


def _withhold_choices(reply: PolicyReply, wishes: RequestOptions) -> PolicyReply:
    body = asgi.parse_body(reply.body)
    for choice in body["choices"]:
        withheld = _list_risky_choices(reply.watch, choice["index"], wishes.above)
        choice.setdefault("trimtab", {})["withheld"] = withheld
        if not withheld:
            continue
        choice |= {"finish_reason": "content_filter", "logprobs": None}
        if "message" in choice:
            choice["message"] = {"role": "assistant", "content": wishes.text}
        else:
            choice["text"] = wishes.text
    return _replace_choices(reply, body)


async def _select_least_risky(ask: AskModel, wishes: RequestOptions, request: dict[str, Any]) -> PolicyReply:
    replies: list[PolicyReply] = []
    for number in range(wishes.tries):
        replies.append(await ask(request if number == 0 else _vary_request(request, number)))
        if replies[-1].status != HTTPStatus.OK or not _list_risky_choices(replies[-1].watch, 0, wishes.above):
            break
    answered = [reply for reply in replies if reply.status == HTTPStatus.OK]
    if not answered:
        return replies[-1]
    best = min(answered, key=lambda reply: reply.watch.risks.get(0, 1.0))
    body = asgi.parse_body(best.body)
    body["trimtab"]["detector"]["tries"] = len(replies)
    # The client pays for all of them.
    spent = [asgi.parse_body(reply.body)["usage"] for reply in answered]
    body["usage"] |= {key: sum(usage[key] for usage in spent) for key in ("completion_tokens", "total_tokens", "prompt_tokens")}
    return _replace_choices(best, body)


def _vary_request(request: dict[str, Any], number: int) -> dict[str, Any]:
    temperature, seed = request.get("temperature"), request.get("seed")
    changed = {"temperature": RETRY_TEMPERATURE} if temperature == 0 else {}
    return request | changed | ({"seed": seed + number} if isinstance(seed, int) else {})


def _replace_choices(reply: PolicyReply, body: dict[str, Any]) -> PolicyReply:
    data = asgi.dump_json(body)
    return PolicyReply(reply.status, asgi.set_content_length(reply.headers, data), data, reply.watch)


def _as_stream(reply: PolicyReply, *, usage: bool) -> PolicyReply:
    """A whole answer as a stream: a chunk with each choice, one with its end, and where wanted one with the usage."""
    body = asgi.parse_body(reply.body)
    about = {key: body[key] for key in ("id", "created", "model")}
    about["object"] = "chat.completion.chunk" if body["object"] == "chat.completion" else body["object"]
    chunks: list[dict[str, Any]] = []
    for choice in body["choices"]:
        begun = {"index": choice["index"], "logprobs": choice["logprobs"], "finish_reason": None}
        if "message" in choice:
            said = {key: value for key, value in choice["message"].items() if value is not None and value != []}
            if "tool_calls" in said:
                said["tool_calls"] = [{"index": number, **call} for number, call in enumerate(said["tool_calls"])]
            begun["delta"], ended = said, {"delta": {}}
        else:
            begun["text"], ended = choice["text"], {"text": ""}
        chunks.append({"choices": [begun]})
        ended |= {key: choice[key] for key in ("index", "finish_reason", "trimtab") if key in choice}
        chunks.append({"choices": [ended | {"logprobs": None}], "trimtab": body["trimtab"]})
    if usage:
        chunks.append({"choices": [], "usage": body["usage"], "trimtab": body["trimtab"]})
    data = b"".join(b"data: " + asgi.dump_json(about | chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    headers = asgi.set_header(reply.headers, b"content-type", b"text/event-stream; charset=utf-8")
    return PolicyReply(reply.status, asgi.set_content_length(headers, data), data, reply.watch)

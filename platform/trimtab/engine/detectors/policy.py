"""What happens to an answer that a detector finds too risky: withheld, or asked for again."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers
from trimtab.engine.detectors.request_risk import Watch
from trimtab.engine.extensions import Wishes
from trimtab.errors import UsageError

# A greedy answer asked for again would be the same.
RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Reply:
    """A whole response, and who watched it."""

    status: int
    headers: Headers
    body: bytes
    watch: Watch


Asking = Callable[[dict[str, Any]], Awaitable[Reply]]
"""Answers a request as a whole."""


def check(wishes: Wishes, request: dict[str, Any], watch: Watch) -> None:
    """Raise UsageError for a policy that cannot be held to, so that no answer passes unseen."""
    if watch.detector is None:
        raise UsageError(f"trimtab.policy {wishes.policy} needs a detector: {watch.reason}")
    if wishes.policy == "retry_above" and ((request.get("n") or 1) != 1 or prompts(request) > 1):
        raise UsageError("trimtab.policy retry_above chooses one answer: ask with one prompt and n 1")


def prompts(request: dict[str, Any]) -> int:
    """How many prompts a request has: a list may be several, or one as token ids."""
    prompt = request.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


async def answer(ask: Asking, wishes: Wishes, request: dict[str, Any]) -> Reply:
    """Ask, and ask again or withhold as the policy says.

    What was streamed cannot be taken back: to a request for a stream the answer that is given is streamed when it is whole.
    """
    options = request.get("stream_options")
    streams = request.get("stream") is True
    whole = {key: value for key, value in request.items() if key != "stream_options"} | {"stream": False}
    reply = await _judged(ask, wishes, whole if streams else request)
    if not streams or reply.status != HTTPStatus.OK:
        return reply
    return _streamed(reply, usage=isinstance(options, dict) and options.get("include_usage") is True)


async def _judged(ask: Asking, wishes: Wishes, request: dict[str, Any]) -> Reply:
    if wishes.policy == "retry_above":
        return await _least_risky(ask, wishes, request)
    reply = await ask(request)
    return reply if reply.status != HTTPStatus.OK else _withheld(reply, wishes)


def _too_risky(watch: Watch, index: int, above: float | None) -> bool:
    """An answer whose risk is not known counts as risky."""
    limit = watch.threshold if above is None else above
    risk = watch.risks.get(index)
    return risk is None or limit is None or risk > limit


def _withheld(reply: Reply, wishes: Wishes) -> Reply:
    body = asgi.parse(reply.body)
    for choice in body["choices"]:
        withheld = _too_risky(reply.watch, choice["index"], wishes.above)
        choice.setdefault("trimtab", {})["withheld"] = withheld
        if not withheld:
            continue
        choice |= {"finish_reason": "content_filter", "logprobs": None}
        if "message" in choice:
            choice["message"] = {"role": "assistant", "content": wishes.text}
        else:
            choice["text"] = wishes.text
    return _changed(reply, body)


async def _least_risky(ask: Asking, wishes: Wishes, request: dict[str, Any]) -> Reply:
    replies: list[Reply] = []
    for number in range(wishes.tries):
        replies.append(await ask(request if number == 0 else _again(request, number)))
        if replies[-1].status != HTTPStatus.OK or not _too_risky(replies[-1].watch, 0, wishes.above):
            break
    answered = [reply for reply in replies if reply.status == HTTPStatus.OK]
    if not answered:
        return replies[-1]
    best = min(answered, key=lambda reply: reply.watch.risks.get(0, 1.0))
    body = asgi.parse(best.body)
    body["trimtab"]["detector"]["tries"] = len(replies)
    # The client pays for all of them.
    spent = [asgi.parse(reply.body)["usage"] for reply in answered]
    body["usage"] |= {key: sum(usage[key] for usage in spent) for key in ("completion_tokens", "total_tokens", "prompt_tokens")}
    return _changed(best, body)


def _again(request: dict[str, Any], number: int) -> dict[str, Any]:
    temperature, seed = request.get("temperature"), request.get("seed")
    changed = {"temperature": RETRY_TEMPERATURE} if temperature == 0 else {}
    return request | changed | ({"seed": seed + number} if isinstance(seed, int) else {})


def _changed(reply: Reply, body: dict[str, Any]) -> Reply:
    data = asgi.dump(body)
    return Reply(reply.status, asgi.with_length(reply.headers, data), data, reply.watch)


def _streamed(reply: Reply, *, usage: bool) -> Reply:
    """A whole answer as a stream: a chunk with each choice, one with its end, and where wanted one with the usage."""
    body = asgi.parse(reply.body)
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
    data = b"".join(b"data: " + asgi.dump(about | chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    headers = asgi.with_header(reply.headers, b"content-type", b"text/event-stream; charset=utf-8")
    return Reply(reply.status, asgi.with_length(headers, data), data, reply.watch)

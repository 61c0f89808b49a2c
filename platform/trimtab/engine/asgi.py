"""ASGI utilities: bounded request bodies, request replay, response buffers and JSON responses."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from trimtab.errors import TooLargeError, UsageError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY = 8 << 20
MAX_DEPTH = 64
# Maximum number of values in a JSON body. Python takes 26 times the size of a body of empty objects.
MAX_VALUES = 200_000
UPLOAD_SECONDS = 60.0
SURROGATES = (rb"\ud", rb"\uD")
SEPARATORS = (b",", b"[", b"{")
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class BufferedRequest:
    """Replay of a request with a replaced body, for the wrapped app.

    Args:
        scope: ASGI scope of the original request.
        receive: `receive` of the original request, for the messages after the body.
        body: new request body; sets the content length.
    """

    def __init__(self, scope: Scope, receive: Receive, body: bytes) -> None:
        self.scope: Scope = {**scope, "headers": set_content_length(scope["headers"], body)}
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        """Return the complete body first, then the client's further messages, such as its disconnect."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def is_event_stream(start: Message) -> bool:
    """Return whether `http.response.start` message `start` begins a stream of server-sent events."""
    return dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")


class ResponseBuffer:
    """A `send` that buffers a complete response instead of sending it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = b""

    async def __call__(self, message: Message) -> None:
        """Process one ASGI message of the wrapped app."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


async def read_body(receive: Receive) -> bytes | None:
    """Read a complete request body.

    Returns:
        The body; None if the client disconnected.

    Raises:
        TooLargeError: if the body is larger than `MAX_BODY` bytes.
        UsageError: if the body is not complete after `UPLOAD_SECONDS` seconds.
    """
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return await _read_chunks(receive)
    except TimeoutError as error:
        raise UsageError(f"the request body was not received within {UPLOAD_SECONDS:g} seconds") from error


async def _read_chunks(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise TooLargeError(f"the request is larger than {MAX_BODY >> 20} MiB")
        if not message.get("more_body"):
            return b"".join(parts)


def check_json_type(scope: Scope) -> None:
    """Check that a request declares its body as JSON. A page of another site can send other types without a preflight request.

    Raises:
        UsageError: if the content type is another one.
    """
    media_type = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0]
    if media_type.strip().lower() != b"application/json":
        raise UsageError("content-type must be application/json")


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a request body as a JSON object.

    Raises:
        UsageError: if the body is not valid JSON, not an object, nested too deeply, has too many values, or contains values
            that cannot be encoded again.
    """
    _check_values(body)
    try:
        request = json.loads(body, parse_constant=_reject_constant)
        # JSON can contain a lone UTF-16 surrogate, which UTF-8 cannot encode.
        if any(escape in body for escape in SURROGATES):
            dump_json(request)
    except (ValueError, RecursionError) as error:
        raise UsageError("the request body is not valid JSON, or contains text or numbers that cannot be processed") from error
    if not isinstance(request, dict):
        raise UsageError("the request body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_deep(request):
        raise UsageError(f"the request body is nested more than {MAX_DEPTH} levels deep")
    return request


def _check_values(body: bytes) -> None:
    """Raise UsageError if a JSON body has too many values. They are counted before the body is parsed."""
    if _count_separators(body) > MAX_VALUES and _count_separators(STRING.sub(b"", body)) > MAX_VALUES:
        raise UsageError(f"the request body has more than {MAX_VALUES} values")


def _count_separators(text: bytes) -> int:
    return sum(map(text.count, SEPARATORS))


def _reject_constant(name: str) -> None:
    """Reject NaN and Infinity, which Python's parser accepts and JSON does not have."""
    raise ValueError(name)


def is_deep(value: Any) -> bool:
    """Return whether a JSON value has more than MAX_DEPTH levels."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def set_content_length(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Headers:
    """Return a copy of `headers` with the content length of `body`."""
    return set_header(headers, b"content-length", str(len(body)).encode())


def set_header(headers: Iterable[tuple[bytes, bytes]], name: bytes, value: bytes) -> Headers:
    """Return a copy of `headers` in which one header replaces all headers of its name.

    Args:
        headers: names and values of the headers.
        name: name of the header, in lower case.
        value: new value.
    """
    return [*((k, v) for k, v in headers if k.lower() != name), (name, value)]


def dump_json(value: Any) -> bytes:
    """Encode a value as UTF-8 JSON in vLLM's format: without spaces or ASCII escapes.

    Raises:
        ValueError: if the value contains NaN or infinity, which JSON does not have.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def send_json(send: Send, status: int, body: Any, headers: Headers | None = None) -> None:
    """Send a complete JSON response.

    Args:
        send: `send` of the client.
        status: HTTP status.
        body: JSON value.
        headers: further headers; content type and length are set here.
    """
    data = dump_json(body)
    await send_response(
        send, status, set_content_length([(b"content-type", b"application/json"), *(headers or [])], data), data
    )


async def send_response(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a complete response with unchanged headers."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""HTTP as ASGI has it: request bodies read within bounds, given again to another app, and JSON sent."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

from trimtab.errors import TooLargeError, TrimtabError, UsageError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger(__name__)

MAX_BODY = 8 << 20
UPLOAD_SECONDS = 60.0
SURROGATES = (rb"\ud", rb"\uD")
NOTES = "trimtab.notes"
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


def annotate_request(scope: Scope, **said: Any) -> None:
    """Leave word of a request for whoever logs it."""
    scope.setdefault(NOTES, {}).update(said)


class BufferedRequest:
    """A request body that was read and changed, given again to the app inside; then the client's own messages."""

    def __init__(self, scope: Scope, receive: Receive, body: bytes) -> None:
        self.scope: Scope = {**scope, "headers": set_content_length(scope["headers"], body)}
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        """The whole body first, then whatever the client sends: its disconnect."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def is_event_stream(start: Message) -> bool:
    """Whether the response that begins so is a stream of events."""
    return dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")


class StatusRecorder:
    """A `send` that remembers the status of the response; 0 before there is one."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class ResponseBuffer:
    """A `send` that keeps a whole response instead of sending it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = b""

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message of the app inside."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


class InternalErrorTo400:
    """A `send` for an app that stumbles over odd requests: its 500 is a 400 where `well` says that nothing is broken."""

    def __init__(self, send: Send, well: Callable[[], bool]) -> None:
        self._send = send
        self._well = well
        self._failed: ResponseBuffer | None = None

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message of the app inside."""
        if message["type"] == "http.response.start" and message["status"] == HTTPStatus.INTERNAL_SERVER_ERROR and self._well():
            self._failed = ResponseBuffer()
        if self._failed is None:
            await self._send(message)
            return
        await self._failed(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            # Not what it said, which may quote the request.
            log.warning("vLLM answered 500 to a request that it could not take")
            await send_json(
                self._send,
                400,
                build_error_body(400, f"vLLM could not take this request: {_get_error_message(self._failed.body)}"),
            )


def _get_error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason given"


async def read_body(receive: Receive) -> bytes | None:
    """The whole request body; None where the client went away. TooLargeError where it is too large, UsageError where it does
    not come to its end."""
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return await _read_chunks(receive)
    except TimeoutError as error:
        raise UsageError(f"the request's body did not come within {UPLOAD_SECONDS:g} seconds") from error


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


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds; UsageError where it holds none."""
    try:
        request = json.loads(body)
        # Half a character of UTF-16, which JSON can write and nothing after this can.
        if any(half in body for half in SURROGATES):
            dump_json(request)
    except (ValueError, RecursionError) as error:
        raise UsageError("the request body is not JSON, or holds text or numbers that nothing can take") from error
    if not isinstance(request, dict):
        raise UsageError("the request body must be a JSON object")
    return request


def set_content_length(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Headers:
    """The headers with the length of a body that was changed."""
    return set_header(headers, b"content-length", str(len(body)).encode())


def set_header(headers: Iterable[tuple[bytes, bytes]], name: bytes, value: bytes) -> Headers:
    """The headers with this one, in the place of any of its name, which is in lower case."""
    return [*((k, v) for k, v in headers if k.lower() != name), (name, value)]


def dump_json(value: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def send_json(send: Send, status: int, body: Any, headers: Headers | None = None) -> None:
    """Answer with JSON."""
    data = dump_json(body)
    await send_response(
        send, status, set_content_length([(b"content-type", b"application/json"), *(headers or [])], data), data
    )


async def send_response(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Answer with all of a response at once; its headers are taken as they are."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: TrimtabError) -> None:
    """Answer with an error of ours, in OpenAI's shape."""
    retry = [(b"retry-after", b"1")] if error.http_status == HTTPStatus.SERVICE_UNAVAILABLE else []
    await send_json(send, error.http_status, build_error_body(error.http_status, str(error)), retry)


def build_error_body(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": TYPES.get(status, "InternalServerError"), "param": None, "code": status}}

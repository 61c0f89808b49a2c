"""Context of one HTTP request, shared by the middleware of a replica and the engine's app."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Message, Receive, Scope, Send
from trimtab.engine.policies import DIGITS, Policy

KEY = "trimtab.request"
# Part of a body that the access log may record (bytes).
RECORDED_BYTES = 32_768

StartHook = Callable[[Message], Awaitable[None]]
"""Called with the start of the response before it is sent; may change its headers."""


@dataclass(frozen=True)
class KeyRights:
    """Rights and policies of the API key that sent a request.

    Attributes:
        policies: policies on the prompts of the key.
        allows_model: returns whether the key may use a model.
        digits: number of decimals of the probabilities that the key receives.
        rates: whether the key may label answers to requests of other keys.
    """

    policies: tuple[Policy, ...] = ()
    allows_model: Callable[[str], bool] = lambda model: True
    digits: int = DIGITS
    rates: bool = False


class RequestContext:
    """Request of a client: its body, which is read and parsed once, and its response, which is sent through `send`.

    Every layer gets the same object from the ASGI scope, so that no layer wraps `receive` or `send` to observe them.

    Args:
        receive: `receive` of the client.
        send: `send` of the client.

    Attributes:
        notes: fields of the access log's record.
        rights: rights of the API key; without keys, a request may use all models.
        server_id: request id of the server; empty for requests without a record.
        status: HTTP status of the response; 0 before it starts.
        streams: whether the response is an event stream.
        first_byte_seconds: time from the start of the request to the first byte of the response body (seconds); None before.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.notes: dict[str, Any] = {}
        self.rights = KeyRights()
        self.server_id = ""
        self.status = 0
        self.streams = False
        self.first_byte_seconds: float | None = None
        self._receive = receive
        self._send = send
        self._clock = time.perf_counter()
        self._omits_body = False
        self._hooks: list[StartHook] = []
        self._body: bytes | None = None
        self._parsed: dict[str, Any] | None = None

    @classmethod
    def get(cls, scope: Scope, receive: Receive, send: Send) -> "RequestContext":
        """Return the context of a request. The outermost layer creates it in the scope.

        A HEAD request is handled as GET, and its response is sent without a body.

        Args:
            scope: ASGI scope of the request.
            receive: `receive` of the client, for a new context.
            send: `send` of the client, for a new context.
        """
        if KEY not in scope:
            scope[KEY] = cls(receive, send)
            if scope["method"] == "HEAD":
                scope["method"], scope[KEY]._omits_body = "GET", True
        return scope[KEY]

    @property
    def body(self) -> bytes:
        """Part of the request body that was read; empty before `read_body`."""
        return self._body or b""

    def on_start(self, hook: StartHook) -> None:
        """Call a function when the response starts, before its first message is sent."""
        self._hooks.append(hook)

    async def read_body(self) -> bytes | None:
        """Return the complete request body; None if the client disconnected.

        Raises:
            TooLargeError: if the body is too large.
            UsageError: if the body does not arrive in time.
        """
        if self._body is None:
            self._body = await asgi.read_body(self._receive)
        return self._body

    async def read_json(self) -> dict[str, Any] | None:
        """Return the request body as a JSON object, which callers must not change; None if the client disconnected.

        Raises:
            TooLargeError: if the body is too large.
            UsageError: if the body does not arrive in time, or is not a JSON object.
        """
        if self._parsed is None and (body := await self.read_body()) is not None:
            self._parsed = asgi.parse_body(body)
        return self._parsed

    def release_body(self) -> None:
        """Free the parsed body, and the body except for its first RECORDED_BYTES. Call it when the body is not read again."""
        self._parsed = None
        if self._body is not None:
            self._body = self._body[:RECORDED_BYTES]

    async def receive(self) -> Message:
        """Return the client's messages after the body, such as its disconnect."""
        return await self._receive()

    async def send(self, message: Message) -> None:
        """Send a message of the response to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams = asgi.is_event_stream(message)
            for hook in self._hooks:
                await hook(message)
        elif self.first_byte_seconds is None and message.get("body"):
            self.first_byte_seconds = round(time.perf_counter() - self._clock, 4)
        if self._omits_body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

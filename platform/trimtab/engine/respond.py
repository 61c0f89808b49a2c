"""Writing into vLLM's responses what answered: the name with its version, and the `trimtab` field."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from trimtab.engine.guard import Steering

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Rewriter:
    """A `send` that adds to JSON answers and to streams on their way out; one for each response.

    In a stream only the chunks that end a choice, and the one with the usage, are parsed; the others get their model's
    name by replacing bytes, so that no token waits.
    """

    def __init__(self, send: Send, base: str, now: Steering | None) -> None:
        self._send = send
        self._now = now
        self._trimtab = {"prefix": _prefix(now)}
        self._model = f"{base}:{now.name}@{now.version}" if now else base
        self._replace = (f'"model":"{base}"'.encode(), f'"model":"{self._model}"'.encode())
        self._start: MutableMapping[str, Any] | None = None
        self._stream = False
        self._buffer = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Take one ASGI message of the app inside."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            self._start = message
            if self._now is not None:
                name = f"{self._now.name}@{self._now.version}".encode()
                message["headers"] = [*message["headers"], (b"x-trimtab-prefix", name)]
            if self._stream:
                await self._send(message)
            return
        if message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
        elif self._stream:
            await self._pass_on(message)
        else:
            await self._collect(message)

    async def _pass_on(self, message: MutableMapping[str, Any]) -> None:
        self._buffer += message.get("body", b"")
        *events, self._buffer = self._buffer.split(b"\n\n")
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        more = bool(message.get("more_body"))
        if not more:
            out, self._buffer = out + self._buffer, b""
        if out or not more:
            await self._send({"type": "http.response.body", "body": out, "more_body": more})

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        ends = b'"finish_reason":"' in event or b'"choices":[]' in event
        if not ends:
            return event.replace(*self._replace, 1)
        chunk = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            return event
        return b"data: " + _dump(chunk | {"model": self._model, "trimtab": self._trimtab})

    async def _collect(self, message: MutableMapping[str, Any]) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body = self._buffer
        if self._start["status"] == HTTPStatus.OK:
            answer = json.loads(body)
            body = _dump(answer | {"model": self._model, "trimtab": self._trimtab})
        headers = [(k, v) for k, v in self._start["headers"] if k.lower() != b"content-length"]
        self._start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


def error_response(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 422: "UnprocessableEntityError", 503: "ServiceUnavailableError"}
    return {"error": {"message": message, "type": kinds.get(status, "InternalServerError"), "param": None, "code": status}}


def _prefix(now: Steering | None) -> dict[str, Any] | None:
    return {"name": now.name, "version": now.version, "run_id": now.run_id} if now else None


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

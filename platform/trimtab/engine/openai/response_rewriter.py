"""Rewriting of vLLM's responses: the model name with its version, and the `trimtab` field."""

import json
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Message, Send
from trimtab.engine.context import Steering
from trimtab.engine.detectors.request_risk import RequestRisk


class ResponseRewriter:
    """A `send` that rewrites one JSON response or stream.

    In a stream, only the chunks that end a choice, the usage chunk, and all chunks with running risks are parsed. Other chunks
    get their model name by replacement of bytes, to add no latency per token.

    Args:
        send: `send` of the client.
        base: name of the base model.
        steering: prefix of the request; None for the plain base model.
        risk: detector and risks of the request.
    """

    def __init__(self, send: Send, base: str, steering: Steering | None, risk: RequestRisk) -> None:
        self._send = send
        self._steering = steering
        self._risk = risk
        self._model = format_model_name(base, steering)
        self._replace = (f'"model":"{base}"'.encode(), f'"model":"{self._model}"'.encode())
        self._start: Message | None = None
        self._stream = False
        self._buffer = b""

    async def __call__(self, message: Message) -> None:
        """Process one ASGI message of the wrapped app."""
        if message["type"] == "http.response.start":
            self._stream = asgi.is_event_stream(message)
            self._start = message
            if self._steering is not None:
                name = f"{self._steering.name}@{self._steering.version}".encode()
                message["headers"] = [*message["headers"], (b"x-trimtab-prefix", name)]
            if label := self._risk.label:
                message["headers"] = [*message["headers"], (b"x-trimtab-detector", label.encode())]
            if self._stream:
                await self._send(message)
            return
        if message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
        elif self._stream:
            await self._rewrite_stream(message)
        else:
            await self._rewrite_response(message)

    async def _rewrite_stream(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        *events, self._buffer = self._buffer.split(b"\n\n")
        out = b"".join(self._rewrite_event(event) + b"\n\n" for event in events)
        more = bool(message.get("more_body"))
        if not more:
            out, self._buffer = out + self._buffer, b""
        if out or not more:
            await self._send({"type": "http.response.body", "body": out, "more_body": more})

    def _rewrite_event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        ends = b'"finish_reason":"' in event or b'"choices":[]' in event
        if not ends and not self._risk.running:
            return event.replace(*self._replace, 1)
        chunk = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            return event
        self._add_risks(chunk["choices"])
        field = {"trimtab": build_trimtab_field(self._steering, self._risk)} if ends else {}
        return b"data: " + asgi.dump_json(chunk | {"model": self._model} | field)

    async def _rewrite_response(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body = self._buffer
        if self._start["status"] == HTTPStatus.OK:
            answer = json.loads(body)
            self._add_risks(answer["choices"])
            body = asgi.dump_json(answer | {"model": self._model, "trimtab": build_trimtab_field(self._steering, self._risk)})
        self._start["headers"] = asgi.set_content_length(self._start["headers"], body)
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    def _add_risks(self, choices: list[dict[str, Any]]) -> None:
        for choice in choices:
            if risk := self._risk.describe_choice(choice["index"]):
                choice["trimtab"] = risk


def format_model_name(base: str, steering: Steering | None) -> str:
    """Return the `model` of a response: `<base>`, or `<base>:<prefix>@<version>`."""
    return f"{base}:{steering.name}@{steering.version}" if steering else base


def build_trimtab_field(steering: Steering | None, risk: RequestRisk) -> dict[str, Any]:
    """Return the `trimtab` field of a response, with its prefix and detectors."""
    prefix = {"name": steering.name, "version": steering.version, "run_id": steering.run_id} if steering else None
    return {"prefix": prefix, "detectors": risk.as_json()}

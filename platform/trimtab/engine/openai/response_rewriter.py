"""Writing into vLLM's responses what answered and what watched: the name with its version, and the `trimtab` field."""

import json
from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Message, Send
from trimtab.engine.context import Steering
from trimtab.engine.detectors.request_risk import RequestRisk


class ResponseRewriter:
    """A `send` that adds to JSON answers and to streams on their way out; one for each response.

    In a stream only the chunks that end a choice, the one with the usage, and where they are asked for those with a running
    risk, are parsed; the others get their model's name by replacing bytes, so that no token waits.
    """

    def __init__(self, send: Send, base: str, now: Steering | None, watch: RequestRisk) -> None:
        self._send = send
        self._now = now
        self._watch = watch
        self._model = format_model_name(base, now)
        self._replace = (f'"model":"{base}"'.encode(), f'"model":"{self._model}"'.encode())
        self._start: Message | None = None
        self._stream = False
        self._buffer = b""

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message of the app inside."""
        if message["type"] == "http.response.start":
            self._stream = asgi.is_event_stream(message)
            self._start = message
            if self._now is not None:
                name = f"{self._now.name}@{self._now.version}".encode()
                message["headers"] = [*message["headers"], (b"x-trimtab-prefix", name)]
            if label := self._watch.label:
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
        if not ends and not self._watch.running:
            return event.replace(*self._replace, 1)
        chunk = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            return event
        self._add_risks(chunk["choices"])
        told = {"trimtab": build_trimtab_field(self._now, self._watch)} if ends else {}
        return b"data: " + asgi.dump_json(chunk | {"model": self._model} | told)

    async def _rewrite_response(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body = self._buffer
        if self._start["status"] == HTTPStatus.OK:
            answer = json.loads(body)
            self._add_risks(answer["choices"])
            body = asgi.dump_json(answer | {"model": self._model, "trimtab": build_trimtab_field(self._now, self._watch)})
        self._start["headers"] = asgi.set_content_length(self._start["headers"], body)
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    def _add_risks(self, choices: list[dict[str, Any]]) -> None:
        for choice in choices:
            if risk := self._watch.describe_choice(choice["index"]):
                choice["trimtab"] = risk


def format_model_name(base: str, now: Steering | None) -> str:
    """What answered, as a response's `model` has it."""
    return f"{base}:{now.name}@{now.version}" if now else base


def build_trimtab_field(now: Steering | None, watch: RequestRisk) -> dict[str, Any]:
    """A response's `trimtab`: the prefix that steered it, and the detector that watched."""
    prefix = {"name": now.name, "version": now.version, "run_id": now.run_id} if now else None
    return {"prefix": prefix, "detector": watch.as_json()}

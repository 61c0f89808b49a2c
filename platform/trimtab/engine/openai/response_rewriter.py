"""Rewriting of vLLM's responses: the model name with its version, the `trimtab` field, refusals and routed requests."""

import json
from http import HTTPStatus

from trimtab.engine import asgi
from trimtab.engine.asgi import Message, Send
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.protocols.protocol import Annotation, Protocol


class ResponseRewriter:
    """A `send` that rewrites one JSON response or stream.

    Args:
        send: `send` of the client.
        protocol: protocol of the response.
        annotation: prefix and detector of the request.
    """

    def __init__(self, send: Send, protocol: Protocol, annotation: Annotation) -> None:
        self._send = send
        self._protocol = protocol
        self._annotation = annotation
        self._start: Message | None = None
        self._stream = False
        self._buffer = b""

    async def __call__(self, message: Message) -> None:
        """Process one ASGI message of the wrapped app."""
        if message["type"] == "http.response.start":
            self._stream = asgi.is_event_stream(message)
            self._start = message
            if steering := self._annotation.steering:
                name = f"{steering.name}@{steering.version}".encode()
                message["headers"] = [*message["headers"], (b"x-trimtab-prefix", name)]
            if label := self._annotation.risk.label:
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
        out = b"".join(self._protocol.rewrite_event(event, self._annotation) + b"\n\n" for event in events)
        more = bool(message.get("more_body"))
        if not more:
            out, self._buffer = out + self._buffer, b""
        if out or not more:
            await self._send({"type": "http.response.body", "body": out, "more_body": more})

    async def _rewrite_response(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body") or self._start is None:
            return
        body, status = self._buffer, self._start["status"]
        if status == HTTPStatus.OK:
            rewritten = self._protocol.rewrite_response(json.loads(body), self._annotation)
            if refusals := self._annotation.refusals:
                self._protocol.withhold_answers(rewritten, refusals)
            body = asgi.dump_json(rewritten)
        else:
            body = self._protocol.rewrite_error(status, body)
        self._start["headers"] = asgi.set_content_length(self._start["headers"], body)
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})


class RouteGate:
    """A `send` that holds a response back as long as a policy can route its request to another model.

    The engine decides with the first output of each choice. Before that, vLLM sends at most the start of a stream, and the
    beginnings of its choices. A response of a request that cannot be routed passes at once.

    Args:
        send: `send` that gets the response if the request is not routed.
        risk: detectors and verdicts of the request.

    Attributes:
        is_open: whether messages pass at once.
    """

    def __init__(self, send: Send, risk: RequestRisk) -> None:
        self._send = send
        self._risk = risk
        self._buffered: list[Message] = []
        self.is_open = not (risk.verdicts.is_active and risk.verdicts.can_route)

    async def __call__(self, message: Message) -> None:
        """Process one ASGI message of the wrapped app: send it, or buffer it."""
        if self.is_open:
            await self._send(message)
            return
        self._buffered.append(message)
        if 0 < self._risk.choices <= len(self._risk.verdicts.started):
            await self.end()

    async def end(self) -> None:
        """Send the buffered messages, and all later messages at once, unless the request is routed."""
        if self._risk.verdicts.route is not None:
            return
        self.is_open = True
        messages, self._buffered = self._buffered, []
        for message in messages:
            await self._send(message)

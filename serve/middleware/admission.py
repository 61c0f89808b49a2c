"""The door that keeps a replica from taking more than it can do, and requests from running for ever."""

import asyncio
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import App, Message, Receive, Scope, Send
from trimtab.errors import BusyError


class AdmissionMiddleware:
    """An ASGI app around another one. `most` requests for answers at a time; more are told to come again. A whole answer, and
    the start of a stream, may take `request_seconds`, a stream `stream_seconds`; the engine is free of them then."""

    def __init__(self, app: App, most: int, request_seconds: float, stream_seconds: float) -> None:
        self._app = app
        self._most = most
        self._request_seconds = request_seconds
        self._stream_seconds = stream_seconds
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request, or say that there are too many."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._running >= self._most:
            await asgi.send_error(send, BusyError(f"{self._running} requests run and wait here already: try again"))
            return
        self._running += 1
        try:
            await self._run_with_timeout(scope, receive, send)
        finally:
            self._running -= 1

    async def _run_with_timeout(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = streams = False
        limit = self._request_seconds

        async def watched(message: Message) -> None:
            nonlocal started, streams, limit
            if message["type"] == "http.response.start":
                started = True
                streams = asgi.is_event_stream(message)
                if streams:
                    limit = self._stream_seconds
                    clock.reschedule(asyncio.get_running_loop().time() + limit)
            await send(message)

        try:
            async with asyncio.timeout(self._request_seconds) as clock:
                await self._app(scope, receive, watched)
        except TimeoutError:
            await _send_timeout(send, limit, started=started, streams=streams)


async def _send_timeout(send: Send, limit: float, *, started: bool, streams: bool) -> None:
    error: dict[str, Any] = asgi.build_error_body(
        504, f"this took longer than the {limit:g} seconds that a request may take here"
    )
    if not started:
        await asgi.send_json(send, 504, error)
    elif streams:
        await send({"type": "http.response.body", "body": b"data: " + asgi.dump_json(error) + b"\n\n", "more_body": False})

"""Admission-control middleware: limits on concurrent requests and on their duration."""

import asyncio
from http import HTTPStatus

from trimtab.engine.asgi import App, Message, Receive, Scope, Send
from trimtab.engine.protocols.errors import build_error_event, send_error, send_failure
from trimtab.engine.request_context import RequestContext
from trimtab.errors import BusyError


class AdmissionMiddleware:
    """ASGI middleware that rejects excess POST requests and cancels those that take too long.

    Args:
        app: wrapped ASGI app.
        most: maximum number of concurrent requests; further ones are answered 503.
        request_seconds: time limit of a complete response and of the start of a stream (seconds).
        stream_seconds: time limit of a stream, from its start (seconds).
    """

    def __init__(self, app: App, most: int, request_seconds: float, stream_seconds: float) -> None:
        self._app = app
        self._most = most
        self._request_seconds = request_seconds
        self._stream_seconds = stream_seconds
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it if too many requests are running."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        context = RequestContext.get(scope, receive, send)
        if self._running >= self._most:
            message = f"{self._running} requests are already running or queued at this replica. Try again later"
            await send_error(context.send, scope["path"], BusyError(message))
            return
        self._running += 1
        try:
            await self._run_with_timeout(context, scope, receive, send)
        finally:
            self._running -= 1

    async def _run_with_timeout(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        async def extend_for_stream(message: Message) -> None:
            if context.streams:
                clock.reschedule(asyncio.get_running_loop().time() + self._stream_seconds)

        context.on_start(extend_for_stream)
        try:
            async with asyncio.timeout(self._request_seconds) as clock:
                await self._app(scope, receive, send)
        except TimeoutError:
            limit = self._stream_seconds if context.streams else self._request_seconds
            await _send_timeout(
                context, scope["path"], f"request timed out: it took longer than the limit of {limit:g} seconds"
            )


async def _send_timeout(context: RequestContext, path: str, message: str) -> None:
    if not context.status:
        await send_failure(context.send, path, HTTPStatus.GATEWAY_TIMEOUT, message)
    elif context.streams:
        event = build_error_event(path, HTTPStatus.GATEWAY_TIMEOUT, message)
        await context.send({"type": "http.response.body", "body": event, "more_body": False})

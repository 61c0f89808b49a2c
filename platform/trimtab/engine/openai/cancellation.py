"""Cancellation and error handling around vLLM's ASGI app."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from http import HTTPStatus

from trimtab.engine import asgi
from trimtab.engine.asgi import App, Message, Receive, Scope, Send
from trimtab.engine.detectors.request_risk import current_risk
from trimtab.engine.metrics import INTERNAL_ERRORS
from trimtab.engine.protocols.errors import build_error_event, send_failure

log = logging.getLogger(__name__)

# Time for vLLM's app to end a request after the client disconnects, before its task is cancelled.
LEAVE_SECONDS = 5.0


class CancellableApp:
    """ASGI app around vLLM's that propagates cancellation and converts exceptions to responses.

    vLLM answers unstreamed requests in separate tasks. These survive the cancellation of a request, but end when the client
    disconnects. Therefore a cancelled request, for example after a timeout, signals a disconnect, and ends when vLLM has
    released it. Until then, no other prefix can evict its slots. An unhandled exception of vLLM becomes a 500 response in
    OpenAI's format, with one log line instead of a traceback; one that ends a stream becomes an error event.

    Args:
        app: vLLM's ASGI app.
        abort: aborts requests by engine id.
    """

    def __init__(self, app: App, abort: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._app = app
        self._abort = abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        channel = CancellableChannel(receive, send)
        task = asyncio.ensure_future(self._app(scope, channel.receive, channel.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await _wait_until_released(task, channel)
            raise
        except Exception as error:
            if channel.started and not channel.ended and not channel.streams:
                raise
            log.warning("vLLM raised %s for a request", type(error).__name__)
            INTERNAL_ERRORS.labels(type(error).__name__).inc()
            if not channel.started:
                await send_failure(send, scope["path"], HTTPStatus.INTERNAL_SERVER_ERROR, "no reason given")
            elif not channel.ended:
                event = build_error_event(scope["path"], HTTPStatus.INTERNAL_SERVER_ERROR, "the stream failed, no reason given")
                await channel.send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            # vLLM's tasks may not have aborted the requests yet.
            if channel.gone.is_set() and (risk := current_risk.get()):
                await self._abort(list(risk.ids.values()))


class CancellableChannel:
    """Channel between the wrapped app and a client, with simulated disconnects.

    Attributes:
        gone: set when the client has disconnected, or to simulate that. Messages sent afterwards are dropped.
        started: whether the response has started.
        streams: whether the response is an event stream.
        ended: whether the response is complete.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self.gone = asyncio.Event()
        self.started = self.streams = self.ended = False
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        """Return the client's next message, or a disconnect when `gone` is set."""
        received, gone = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({received, gone}, return_when=asyncio.FIRST_COMPLETED)
            message = received.result() if received.done() else {"type": "http.disconnect"}
        finally:
            received.cancel()
            gone.cancel()
        if message["type"] == "http.disconnect":
            self.gone.set()
        return message

    async def send(self, message: Message) -> None:
        """Send a message to the client, unless it has disconnected."""
        if self.gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.started = True
            self.streams = asgi.is_event_stream(message)
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body")
        await self._send(message)


async def _wait_until_released(task: asyncio.Future[None], channel: CancellableChannel) -> None:
    """Signal a disconnect, and wait until the wrapped app has released the request. Exceptions are ignored."""
    channel.gone.set()
    if not channel.streams:
        await asyncio.wait({task}, timeout=LEAVE_SECONDS)
    # The task itself writes a stream, and ends it when it is cancelled.
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task

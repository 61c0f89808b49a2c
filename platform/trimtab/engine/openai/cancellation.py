"""The app inside: vLLM's, whose requests end when ours do, and whose errors end in an answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from trimtab.engine import asgi
from trimtab.engine.asgi import App, Message, Receive, Scope, Send
from trimtab.engine.detectors.request_risk import current_risk

log = logging.getLogger(__name__)

# What vLLM's app may take to let go of a request whose client has gone, before it is made to.
LEAVE_SECONDS = 5.0


class CancellableApp:
    """An ASGI app around vLLM's; `abort` ends requests by their ids in the engine.

    vLLM answers whole requests in tasks of its own, which a cancelled request leaves running; but it ends them where the client
    goes away. So a request that is cancelled, as by a timeout, tells it just that, and ends when vLLM has let go: nobody gives
    its prefix's rows to another while the engine still reads them. An error that vLLM did not think of is a 500 in OpenAI's
    shape, and no traceback for each.
    """

    def __init__(self, app: App, abort: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._app = app
        self._abort = abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = CancellableChannel(receive, send)
        task = asyncio.ensure_future(self._app(scope, line.receive, line.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await _wait_until_released(task, line)
            raise
        except Exception as error:
            if line.begun and not line.ended:
                raise
            log.warning("vLLM raised %s for a request", type(error).__name__)
            if not line.begun:
                await asgi.send_json(send, 500, asgi.build_error_body(500, "no reason given"))
        finally:
            # vLLM's own tasks may still be on their way to this.
            if line.gone.is_set() and (watch := current_risk.get()):
                await self._abort(list(watch.ids.values()))


class CancellableChannel:
    """A client as the app inside sees it, which may go, or be said to have gone; what is sent to it then goes nowhere."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.gone = asyncio.Event()
        self.begun = self.streams = self.ended = False
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        """The client's next message, or that it has gone."""
        heard, gone = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({heard, gone}, return_when=asyncio.FIRST_COMPLETED)
            message = heard.result() if heard.done() else {"type": "http.disconnect"}
        finally:
            heard.cancel()
            gone.cancel()
        if message["type"] == "http.disconnect":
            self.gone.set()
        return message

    async def send(self, message: Message) -> None:
        """Send to the client, if it is there."""
        if self.gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self.streams = asgi.is_event_stream(message)
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body")
        await self._send(message)


async def _wait_until_released(task: asyncio.Future[None], line: CancellableChannel) -> None:
    """Wait until the app inside has let go of a request; what it says meanwhile interests nobody."""
    line.gone.set()
    if not line.streams:
        await asyncio.wait({task}, timeout=LEAVE_SECONDS)
    # Streams are written by the task itself, which ends them where it is cancelled.
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task

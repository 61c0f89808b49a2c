"""Host middleware: requests to a server without API keys must name a local host."""

from http import HTTPStatus

from trimtab.engine.asgi import App, Receive, Scope, Send
from trimtab.engine.protocols.errors import send_failure
from trimtab.serve.api_keys import LOOPBACK


class HostMiddleware:
    """ASGI middleware that rejects requests whose Host header is not a local name.

    A web page of another site can let its own name resolve to 127.0.0.1. Its requests would then reach a server that relies on
    the loopback address instead of keys.

    Args:
        app: wrapped ASGI app.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with status 403."""
        if scope["type"] == "http" and not _is_local(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            message = "this server has no API keys and answers requests to localhost only. Use http://127.0.0.1 as address"
            await send_failure(send, scope["path"], HTTPStatus.FORBIDDEN, message)
            return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    """Return whether a Host header, with or without a port, is a local name; clients of HTTP/1.0 may send none."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return not host or name.lower() in LOOPBACK

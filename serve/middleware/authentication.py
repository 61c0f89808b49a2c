"""Access middleware: API keys with their models and rate limits, open paths, and hosts of a server without keys."""

import asyncio
import hmac
import json
import logging
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

from trimtab.engine.asgi import App, Receive, Scope, Send
from trimtab.engine.context import tenant
from trimtab.engine.protocols.errors import send_error, send_failure
from trimtab.engine.protocols.paths import FEEDBACK_PATH
from trimtab.engine.request_context import RequestContext
from trimtab.errors import TrimtabError, UsageError
from trimtab.serve.api_keys import ANY, LOOPBACK, ApiKey, hash_key, read_keys
from trimtab.serve.middleware.rate_window import RateWindow
from trimtab.serve.static_page import NAMES

log = logging.getLogger(__name__)

# Paths without authentication, for GET and HEAD only: the page, whose own requests need a key, and health checks.
OPEN = (*NAMES, "/health", "/ping")
READ_METHODS = ("GET", "HEAD")
METRICS = "/metrics"
MINUTE = 60.0
READ_SECONDS, READ_TIMEOUT_SECONDS = 2.0, 5.0
# Length of the salt of a key's KV cache, in hexadecimal digits.
SALT_DIGITS = 16


class OpenPathMiddleware:
    """ASGI middleware that rejects all methods but GET and HEAD on paths without authentication, before anything is read.

    Args:
        app: wrapped ASGI app.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with status 405."""
        if scope["type"] == "http" and _is_open(scope) and scope["method"] not in READ_METHODS:
            allow = (b"allow", ", ".join(READ_METHODS).encode())
            message = f"{scope['path'][:100]} accepts GET and HEAD only"
            await send_failure(send, scope["path"], HTTPStatus.METHOD_NOT_ALLOWED, message, [allow, (b"connection", b"close")])
            return
        await self._app(scope, receive, send)


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


class AuthenticationMiddleware:
    """ASGI middleware that admits requests with a valid API key.

    A changed key file takes effect within READ_SECONDS; a damaged or missing one is ignored with a warning. A server that
    starts without keys admits all requests until the file has keys.

    Args:
        app: wrapped ASGI app.
        path: key file.
        max_concurrent: maximum number of concurrent requests of a key without a limit of its own.
        share_cache: let the keys share the KV cache. With a shared cache, the time to the first token reveals whether another
            key has sent the same text.

    Raises:
        ArtifactError: if the key file is damaged at the start.
    """

    def __init__(self, app: App, path: Path, max_concurrent: int, *, share_cache: bool = False) -> None:
        self._app = app
        self._path = path
        self._max_concurrent = max_concurrent
        self._share_cache = share_cache
        self._keys = read_keys(path)
        self._required = bool(self._keys)
        self._running: Counter[str] = Counter()
        self._admitted = RateWindow(MINUTE)
        self._read_at = -READ_SECONDS
        self._reading = asyncio.Lock()
        # A thread of its own: the other ones may be busy with metrics.
        self._executor = ThreadPoolExecutor(1, "trimtab-keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with status 401, 403 or 429."""
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        context = RequestContext.get(scope, receive, send)
        await self._refresh()
        if not self._required:
            await self._app(scope, receive, send)
            return
        key = self._find_key(scope)
        if key is None:
            message = "API key missing or invalid. Send it as Authorization: Bearer KEY, or as x-api-key: KEY"
            await send_failure(
                context.send, scope["path"], HTTPStatus.UNAUTHORIZED, message, [(b"www-authenticate", b"Bearer")]
            )
            return
        context.notes["key"] = key.name
        context.rights = key.rights
        limit = key.concurrent or self._max_concurrent
        if self._running[key.name] >= limit:
            message = f"too many concurrent requests of key {key.name}: the limit is {limit}"
            await send_failure(context.send, scope["path"], HTTPStatus.TOO_MANY_REQUESTS, message, [(b"retry-after", b"1")])
            return
        if scope["path"].rstrip("/") == METRICS and not key.metrics:
            message = f"key {key.name} must not read {METRICS}. Create a key with trimtab keys add NAME --metrics true"
            await send_failure(context.send, scope["path"], HTTPStatus.FORBIDDEN, message)
            return
        if not self._share_cache:
            tenant.set(hash_key(key.name)[:SALT_DIGITS])
        # Count before the first await, so that concurrent requests cannot pass the check together.
        self._running[key.name] += 1
        try:
            if await self._allows_rate(key, context, scope["path"]) and await self._allows_model(key, context, scope):
                await self._app(scope, receive, send)
        finally:
            self._running[key.name] -= 1

    async def _allows_rate(self, key: ApiKey, context: RequestContext, path: str) -> bool:
        if not key.per_minute or not (wait := self._admitted.count_event(key.name, key.per_minute)):
            return True
        seconds = str(max(1, math.ceil(wait))).encode()
        message = f"rate limit of key {key.name} reached: {key.per_minute} requests per minute"
        await send_failure(context.send, path, HTTPStatus.TOO_MANY_REQUESTS, message, [(b"retry-after", seconds)])
        return False

    async def _allows_model(self, key: ApiKey, context: RequestContext, scope: Scope) -> bool:
        if key.models == [ANY] or scope["method"] != "POST" or scope["path"].rstrip("/") == FEEDBACK_PATH:
            return True
        try:
            if (request := await context.read_json()) is None:
                return False
        except UsageError as error:
            await send_error(context.send, scope["path"], error)
            return False
        model = request.get("model")
        if isinstance(model, str) and key.allows_model(model):
            return True
        requested = json.dumps(model) if isinstance(model, str) else "a request without a model name"
        message = f"key {key.name} allows {', '.join(key.models)}, not {requested[:200]}"
        await send_failure(context.send, scope["path"], HTTPStatus.FORBIDDEN, message)
        return False

    def _find_key(self, scope: Scope) -> ApiKey | None:
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        # Anthropic's clients send x-api-key.
        if scheme.lower() != "bearer":
            token = headers.get(b"x-api-key", b"").decode("latin-1")
        digest = hash_key(token.strip())
        # Compare with every key, so that the response time reveals nothing about them.
        matches = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches and token else None

    async def _refresh(self) -> None:
        """Read the key file if the last read is READ_SECONDS old; requests wait, so that a removed key is soon invalid."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._read_at < READ_SECONDS:
            return
        async with self._reading:
            if (now := loop.time()) - self._read_at >= READ_SECONDS:
                await self._read_keys()
                self._read_at = now

    async def _read_keys(self) -> None:
        read = asyncio.get_running_loop().run_in_executor(self._executor, read_keys, self._path)
        try:
            keys = await asyncio.wait_for(read, READ_TIMEOUT_SECONDS)
        except (TrimtabError, OSError) as error:
            log.warning("the key file cannot be read, its last keys stay valid: %s", error)
            return
        if keys or not self._required or self._path.exists():
            self._keys = keys
            self._required |= bool(keys)
        else:
            log.warning("the key file %s is gone, its last keys stay valid", self._path)


def _is_open(scope: Scope) -> bool:
    return (scope["path"].rstrip("/") or "/") in OPEN


def _is_local(host: str) -> bool:
    """Return whether a Host header, with or without a port, is a local name; clients of HTTP/1.0 may send none."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return not host or name.lower() in (*LOOPBACK, "::1")

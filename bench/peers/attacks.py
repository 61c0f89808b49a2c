"""Attacks on a server, each a coroutine that one process runs until it is stopped.

python bench/peers/attacks.py NAME URL KEY    (key: an API key, or "none")
"""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp

# Models of the server's registry: versions without an alias, some of which are damaged.
HERD = [f"herd@{number}" for number in range(1, 41)]
# Pause of each client between two requests (seconds): the attack shall load the server, not the cores of its clients.
PAUSE = 0.05
DEEP_REJECTED, DEEP_ACCEPTED, BRANCHES = 600, 50, 20


def main() -> None:
    name, url, key = sys.argv[1:4]
    asyncio.run(ATTACKS[name](url, key))


async def open_connections(url: str, key: str) -> None:
    """Open 1,000 connections with half a request line each, and open new ones when they are closed."""
    await asyncio.gather(*(_hold_connection(url, b"GET /v1/models HT") for _ in range(1000)))


async def post_to_open_paths(url: str, key: str) -> None:
    """Send 200 requests to an open path whose body never arrives."""
    head = b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    await asyncio.gather(*(_hold_connection(url, head) for _ in range(200)))


async def send_deep_schemas(url: str, key: str) -> None:
    """Send schemas of 600 levels, and the deepest ones that the server accepts."""

    def build() -> dict[str, Any]:
        schema: dict[str, Any] = {"anyOf": [_nest(DEEP_ACCEPTED)] * BRANCHES}
        schema = schema if random.random() < 0.5 else _nest(DEEP_REJECTED)
        return _build_chat(1) | {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        }

    await _send_forever(url, key, build, clients=4)


async def send_many_values(url: str, key: str) -> None:
    """Send bodies of 8 MB with millions of empty objects."""
    body = b'{"model": "smollm2-135m", "messages": [], "x": [' + b",".join([b"{}"] * 2_700_000) + b"]}"
    await _send_forever(url, key, lambda: body, clients=2)


async def send_slow_bodies(url: str, key: str) -> None:
    """Send 100 bodies with one byte per second."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    await asyncio.gather(*(_hold_connection(url, head.encode(), trickle=True) for _ in range(100)))


async def send_long_paths(url: str, key: str) -> None:
    """Send requests without a key to long paths."""
    await _send_forever(url, "none", dict, clients=16, path=lambda: "/" + "%01" * 5_000)


async def request_unloaded_versions(url: str, key: str) -> None:
    """Request 40 versions that are not loaded, some of them damaged, all at the same time."""
    await _send_forever(url, key, lambda: _build_chat(1, f"smollm2-135m:{random.choice(HERD)}"), clients=16)


async def read_metrics(url: str, key: str) -> None:
    """Read the metrics without a pause; the key has the permission."""
    await _send_forever(url, key, None, clients=8, path=lambda: "/metrics", pause=0)


async def request_long_answers(url: str, key: str) -> None:
    """Request 64 long answers at a time."""
    await _send_forever(url, key, lambda: _build_chat(400) | {"ignore_eos": True}, clients=64, pause=0)


async def request_unknown_names(url: str, key: str) -> None:
    """Request names and detectors that do not exist."""
    await _send_forever(url, key, lambda: _build_chat(1, f"smollm2-135m:{random.random()}"), clients=16)


async def _send_forever(
    url: str,
    key: str,
    build: Callable[[], Any] | None,
    clients: int,
    path: Callable[[], str] = lambda: "/v1/chat/completions",
    pause: float = PAUSE,
) -> None:
    headers = {"content-type": "application/json"} | ({} if key == "none" else {"authorization": f"Bearer {key}"})

    async def send(session: aiohttp.ClientSession) -> None:
        while True:
            body = None if build is None else build()
            data = {"data": body} if isinstance(body, bytes) else {"json": body}
            with suppress(aiohttp.ClientError, TimeoutError):
                request = session.get(url + path()) if build is None else session.post(url + path(), **data)
                async with request as response:
                    await response.read()
            await asyncio.sleep(pause)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        await asyncio.gather(*(send(session) for _ in range(clients)))


async def _hold_connection(url: str, head: bytes, *, trickle: bool = False) -> None:
    parts = urlsplit(url)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(head)
            read = asyncio.create_task(reader.read())
            while not read.done():
                if trickle:
                    writer.write(b" ")
                await asyncio.wait([read], timeout=1)
            with suppress(OSError):
                await read
            writer.close()
        await asyncio.sleep(PAUSE)


def _nest(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def _build_chat(tokens: int, model: str = "smollm2-135m") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens}


ATTACKS: dict[str, Callable[[str, str], Awaitable[None]]] = {
    "idle connections": open_connections,
    "open posts": post_to_open_paths,
    "deep schemas": send_deep_schemas,
    "large element counts": send_many_values,
    "slow bodies": send_slow_bodies,
    "path floods": send_long_paths,
    "version herds": request_unloaded_versions,
    "metrics hammering": read_metrics,
    "many long answers": request_long_answers,
    "unloaded names": request_unknown_names,
}

if __name__ == "__main__":
    main()

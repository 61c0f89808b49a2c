"""Host check of a server without API keys."""

import asyncio

import httpx
import pytest

from trimtab.engine import asgi
from trimtab.serve.middleware.authentication import HostMiddleware


async def answer(scope, receive, send):
    await asgi.send_json(send, 200, {})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("[::1]:8000", 200),
        ("", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::2]:8000", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_only_local_names_are_answered(host, status):
    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(HostMiddleware(answer)), base_url="http://test") as client:
            return await client.get("/v1/models", headers={"host": host})

    assert asyncio.run(get()).status_code == status

"""The doors in front of a replica's engine: how many may come in, how long they may stay, and what is kept of them."""

import asyncio

import httpx


def asked(app, *requests, together=False):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30) as client:
            calls = [client.post(path, content=b'{"secret": 1}', headers=headers) for path, headers in requests]
            return await asyncio.gather(*calls) if together else [await call for call in calls]

    return asyncio.run(run())

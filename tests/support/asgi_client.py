"""In-process client of ASGI applications, and an application for tests of middleware."""

import asyncio

import httpx

from trimtab.engine import asgi
from trimtab.engine.request_context import RequestContext


def send_requests(app, *requests, concurrent=False):
    """Send requests of (path, headers) one after the other or at once; return the responses in order."""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30) as client:
            calls = [client.post(path, content=b'{"secret": 1}', headers=headers) for path, headers in requests]
            return await asyncio.gather(*calls) if concurrent else [await call for call in calls]

    return asyncio.run(run())


async def upstream_app(scope, receive, send):
    """Stream without end at /stream, never respond at /never, and otherwise respond with the size of the request body."""
    if scope["path"] == "/stream":
        send = RequestContext.get(scope, receive, send).send
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await asyncio.Event().wait()
    if scope["path"] == "/never":
        await asyncio.Event().wait()
    context = RequestContext.get(scope, receive, send)
    context.notes |= {"model": "m@1", "risk": 0.5, "detector": None}
    await asyncio.sleep(0)
    await asgi.send_json(context.send, 200, {"read": len(await context.read_body() or b"")})

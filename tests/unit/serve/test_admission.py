"""The doors in front of a replica's engine: how many may come in, how long they may stay, and what is kept of them."""

import asyncio
import json

import pytest

from tests.support.asgi_client import asked
from trimtab.engine import asgi
from trimtab.engine.request_context import RequestContext
from trimtab.errors import UsageError
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.admission import AdmissionMiddleware


async def slow(scope, receive, send):
    """The server inside: answers, or streams for ever, after its door is opened."""
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


def test_too_many_requests_are_told_to_come_again():
    replies = asked(AdmissionMiddleware(slow, 3, 60, 60), *[("/", {})] * 5, together=True)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 503, 503]
    late = next(reply for reply in replies if reply.status_code == 503)
    assert late.headers["retry-after"] == "1"
    assert "3 requests are already running or queued" in late.json()["error"]["message"]


def test_a_body_that_does_not_come_to_its_end_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(asgi, "UPLOAD_SECONDS", 0.05)
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    with pytest.raises(UsageError, match="was not received within"):
        asyncio.run(asgi.read_body(receive))


def test_what_takes_too_long_is_ended_and_makes_room():
    door = AdmissionMiddleware(slow, 1, 0.05, 0.05)
    never, stream, good = asked(door, ("/never", {}), ("/stream", {}), ("/", {}))
    assert never.status_code == 504
    assert "longer than the limit of 0.05 seconds" in never.json()["error"]["message"]
    pieces = stream.text.strip().split("\n\n")
    assert pieces[0] == "data: {}"
    assert json.loads(pieces[1].removeprefix("data: "))["error"]["type"] == "TimeoutError"
    assert good.status_code == 200


@pytest.mark.parametrize(
    "wrong", [{"num_replicas": 0}, {"trace_sampling_ratio": 2}, {"request_timeout_s": 0}, {"max_queued_requests": -1}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        ServeConfig(**wrong)

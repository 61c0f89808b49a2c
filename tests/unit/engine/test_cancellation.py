"""Requests of the app inside an online engine: cancellation, disconnects and errors."""

import asyncio
import json

import httpx
import pytest

from trimtab.engine import asgi
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.openai.cancellation import CancellableApp
from trimtab.engine.protocols.errors import send_failure


class SlowApp:
    """App whose requests run until the client disconnects, each in a task that is then cancelled, as in vLLM."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def __call__(self, scope, receive, send) -> None:
        task = asyncio.create_task(self.handle_request(scope["path"]))
        disconnect = asyncio.create_task(self.wait_for_disconnect(receive))
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asgi.send_json(send, 200, None)

    async def handle_request(self, path: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(path)

    async def wait_for_disconnect(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def test_cancellation_ends_the_inner_request_first():
    app, aborted, messages = SlowApp(), [], []

    async def abort(ids) -> None:
        aborted.extend(ids)

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    async def send(message) -> None:
        messages.append(message)

    async def run() -> None:
        current_risk.set(RequestRisk(ids={"client": "engine"}))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await CancellableApp(app, abort)({"type": "http", "path": "/x"}, receive, send)
        assert app.ended == ["/x"]

    asyncio.run(run())
    assert aborted == ["engine"]
    assert messages == [], "a cancelled request must not receive a response"


def test_disconnect_aborts_the_engine_request():
    app, aborted = SlowApp(), []

    async def abort(ids) -> None:
        aborted.extend(ids)

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def run() -> None:
        current_risk.set(RequestRisk(ids={"client": "engine"}))
        await CancellableApp(app, abort)({"type": "http", "path": "/x"}, receive, None)

    asyncio.run(run())
    assert (app.ended, aborted) == (["/x"], ["engine"])


def test_stream_that_fails_ends_with_an_error_event():
    async def failing_app(scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise AttributeError("'list' object has no attribute 'get'")

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(CancellableApp(failing_app, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/chat/completions")

    first, last = asyncio.run(post()).text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 500


@pytest.mark.parametrize(("path", "message"), [("/", "no reason given"), ("/sent", "so")])
def test_inner_error_becomes_a_response(path, message):
    async def failing_app(scope, receive, send) -> None:
        if scope["path"] == "/sent":
            await send_failure(send, scope["path"], 500, "so")
        raise AttributeError("'list' object has no attribute 'get'")

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(CancellableApp(failing_app, None)), base_url="http://test"
        ) as client:
            return await client.post(path)

    response = asyncio.run(post())
    assert (response.status_code, response.json()["error"]["message"]) == (500, message)

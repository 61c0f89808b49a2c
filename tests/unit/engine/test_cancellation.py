"""The app inside an online engine: its requests end with ours, and its errors are answers."""

import asyncio

import httpx
import pytest

from trimtab.engine import asgi
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.openai.cancellation import CancellableApp


class Slow:
    """Answers whole requests in a task of its own, as vLLM does, and ends it where the client goes away."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def __call__(self, scope, receive, send) -> None:
        task = asyncio.create_task(self.work(scope["path"]))
        left = asyncio.create_task(self.gone(receive))
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asgi.send_json(send, 200, None)

    async def work(self, path: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(path)

    async def gone(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def test_a_request_that_is_cancelled_ends_inside_before_it_ends_here():
    inside, aborted, sent = Slow(), [], []

    async def abort(ids) -> None:
        aborted.extend(ids)

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    async def send(message) -> None:
        sent.append(message)

    async def run() -> None:
        current_risk.set(RequestRisk(ids={"client": "engine"}))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await CancellableApp(inside, abort)({"type": "http", "path": "/x"}, receive, send)
        assert inside.ended == ["/x"]

    asyncio.run(run())
    assert aborted == ["engine"]
    assert sent == [], "who has gone is told nothing"


def test_a_client_that_goes_away_frees_the_engine():
    inside, aborted = Slow(), []

    async def abort(ids) -> None:
        aborted.extend(ids)

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def run() -> None:
        current_risk.set(RequestRisk(ids={"client": "engine"}))
        await CancellableApp(inside, abort)({"type": "http", "path": "/x"}, receive, None)

    asyncio.run(run())
    assert (inside.ended, aborted) == (["/x"], ["engine"])


def test_an_error_inside_is_an_answer():
    async def raising(scope, receive, send) -> None:
        if scope["path"] == "/said":
            await asgi.send_json(send, 500, asgi.build_error_body(500, "so"))
        raise AttributeError("'list' object has no attribute 'get'")

    async def ask(path: str) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(CancellableApp(raising, None)), base_url="http://test"
        ) as client:
            return await client.post(path)

    for path, message in (("/", "no reason given"), ("/said", "so")):
        reply = asyncio.run(ask(path))
        assert (reply.status_code, reply.json()["error"]["message"]) == (500, message)

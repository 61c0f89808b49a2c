"""Errors of vLLM's app: status 400 for malformed requests, status 500 for all others."""

import asyncio
import types

import httpx
import pytest
from fastapi import FastAPI
from vllm.exceptions import VLLMValidationError

from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.engine.metrics import INTERNAL_ERRORS, MALFORMED_REQUESTS
from trimtab.engine.openai.cancellation import CancellableApp
from trimtab.engine.openai.malformed import install_malformed_handlers, install_rejection


def post(error: Exception, risk: RequestRisk) -> httpx.Response:
    """Send a request to an app that raises an error."""
    app = FastAPI()
    install_malformed_handlers(app)

    @app.post("/")
    async def fail() -> None:
        raise error

    async def abort(ids) -> None:
        raise AssertionError("no request runs")

    async def send() -> httpx.Response:
        current_risk.set(risk)
        transport = httpx.ASGITransport(CancellableApp(app, abort))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/")

    return asyncio.run(send())


@pytest.mark.parametrize(
    "error", [AttributeError("'list' object has no attribute 'get'"), KeyError("type"), RecursionError("too deep")]
)
def test_malformed_requests_are_status_400_and_counted(error):
    counter = MALFORMED_REQUESTS.labels(type(error).__name__)
    before = counter._value.get()
    response = post(error, RequestRisk())
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"
    assert str(error) in response.json()["error"]["message"]
    assert counter._value.get() == before + 1


@pytest.mark.parametrize("error", [ValueError("bad value"), KeyError("type"), VLLMValidationError("too long")])
def test_errors_of_the_engine_before_acceptance_are_those_of_the_request(error):
    async def add_request(request_id: str) -> None:
        raise error

    engine = types.SimpleNamespace(add_request=add_request)
    install_rejection(engine)
    with pytest.raises(VLLMValidationError) as raised:
        asyncio.run(engine.add_request("x"))
    assert str(error.args[0]) in str(raised.value)


@pytest.mark.parametrize(
    ("error", "risk"),
    [
        (AttributeError("a fault while the engine generates"), RequestRisk(ids={"client": "engine"})),
        (RuntimeError("a fault"), RequestRisk()),
    ],
)
def test_other_errors_are_status_500_and_counted(error, risk):
    counter = INTERNAL_ERRORS.labels(type(error).__name__)
    before = counter._value.get()
    assert post(error, risk).status_code == 500
    assert counter._value.get() == before + 1

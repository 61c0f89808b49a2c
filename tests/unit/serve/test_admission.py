"""Admission control: limits on concurrent requests and their duration."""

import asyncio
import json

import pytest

from tests.support.asgi_client import send_requests, upstream_app
from trimtab.engine import asgi
from trimtab.errors import UsageError
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.admission import AdmissionMiddleware


def test_rejects_requests_above_concurrency_limit():
    responses = send_requests(AdmissionMiddleware(upstream_app, 3, 60, 60), *[("/", {})] * 5, concurrent=True)
    assert sorted(response.status_code for response in responses) == [200, 200, 200, 503, 503]
    rejected = next(response for response in responses if response.status_code == 503)
    assert rejected.headers["retry-after"] == "1"
    assert "3 requests are already running or queued" in rejected.json()["error"]["message"]


def test_incomplete_body_times_out(monkeypatch):
    monkeypatch.setattr(asgi, "UPLOAD_SECONDS", 0.05)
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    with pytest.raises(UsageError, match="was not received within"):
        asyncio.run(asgi.read_body(receive))


def test_request_timeout_frees_capacity():
    """Requests run one after the other with a capacity of one, so that the last is admitted only after the timeouts."""
    middleware = AdmissionMiddleware(upstream_app, 1, 0.05, 0.05)
    timed_out, stream, admitted = send_requests(middleware, ("/never", {}), ("/stream", {}), ("/", {}))
    assert timed_out.status_code == 504
    assert "longer than the limit of 0.05 seconds" in timed_out.json()["error"]["message"]
    events = stream.text.strip().split("\n\n")
    assert events[0] == "data: {}"
    assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "TimeoutError"
    assert admitted.status_code == 200


@pytest.mark.parametrize(
    "options",
    [{"num_replicas": 0}, {"host": "::1"}, {"trace_sampling_ratio": 2}, {"request_timeout_s": 0}, {"max_queued_requests": -1}],
)
def test_rejects_invalid_settings(options):
    with pytest.raises(UsageError):
        ServeConfig(**options)

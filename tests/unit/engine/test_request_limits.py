"""Limits of request bodies: depth, number of values, numbers that JSON does not have, and freed memory."""

import asyncio
import json

import pytest

from trimtab.engine import asgi
from trimtab.engine.request_context import RECORDED_BYTES, RequestContext
from trimtab.errors import UsageError


def nest(levels: int) -> bytes:
    return b'{"x":' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":[' + b",".join([b"{}"] * asgi.MAX_VALUES) + b"]}",
        b'{"x":[' + b",".join([b"0"] * (asgi.MAX_VALUES + 1)) + b"]}",
        b'{"t":"\\"","x":[' + b",".join([b'","'] * (asgi.MAX_VALUES + 1)) + b"]}",
        nest(asgi.MAX_DEPTH),
        b'{"x": NaN}',
        b'{"x": [-Infinity]}',
        b'{"x": "\\ud800"}',
        b"[]",
        b"{",
    ],
    ids=["objects", "numbers", "texts", "deep", "NaN", "infinity", "surrogate", "list", "half"],
)
def test_rejects_body(body):
    with pytest.raises(UsageError) as error:
        asgi.parse_body(body)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [",[{" * asgi.MAX_VALUES, '\\"[{,' * asgi.MAX_VALUES, "\\", list(range(100_000)), json.loads(nest(62))]
)
def test_accepts_long_texts_and_many_token_ids(value):
    assert asgi.parse_body(json.dumps({"x": value}).encode()) == {"x": value}


def test_response_never_contains_a_number_that_json_does_not_have():
    with pytest.raises(ValueError, match="not JSON compliant"):
        asgi.dump_json({"risk": float("nan")})


def test_released_body_leaves_what_the_log_records():
    body = json.dumps({"x": "y" * 2 * RECORDED_BYTES}).encode()

    async def run() -> None:
        async def receive():
            return {"type": "http.request", "body": body}

        context = RequestContext(receive, receive)
        assert await context.read_json() == json.loads(body)
        context.release_body()
        assert context.body == body[:RECORDED_BYTES]

    asyncio.run(run())

"""Limits of requests on a real server: values, depth, schemas and lengths."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

BASE, CHATS = "smollm2-135m", "/v1/chat/completions"
USER = [{"role": "user", "content": "Name a fruit."}]
MEBIBYTE = 1 << 20


def nest(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def with_schema(schema: dict, **fields) -> dict:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"model": BASE, "messages": USER, "max_tokens": 1, "response_format": response_format} | fields


def send(url: str, body: dict, path: str = CHATS) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=120)


REJECTED = {
    "deep schema": (with_schema(nest(600)), "levels deep"),
    "deep schema as text": ({"structured_outputs": {"json": json.dumps(nest(600))}}, "levels deep"),
    "large schema": (with_schema({"enum": ["x" * MEBIBYTE]}), "the limit is"),
    "large choice": ({"structured_outputs": {"choice": ["x" * 30] * 20_000}}, "the limit is"),
    "invalid schema": (with_schema({"type": "array", "items": {"type": "fruit"}}), ""),
    "many values": ({"x": [{}] * 250_000}, "more than 200000 values"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_request_in_one_line(url, name):
    fields, reason = REJECTED[name]
    response = send(url, {"model": BASE, "messages": USER, "max_tokens": 1} | fields)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"].strip()


def test_not_a_number_is_rejected(url):
    body = json.dumps({"model": BASE, "messages": USER, "temperature": float("nan")}).encode()
    response = httpx.post(f"{url}{CHATS}", content=body, headers={"content-type": "application/json"}, timeout=60)
    assert response.status_code == 400


def test_answers_follow_schemas_also_of_simultaneous_requests(url):
    schema = {"type": "object", "properties": {"fruit": {"enum": ["apple", "pear"]}}, "required": ["fruit"]}
    body = with_schema(schema, max_tokens=40, temperature=0, model=f"{BASE}:one")
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda _: send(url, body), range(8)))
    texts = [response.json()["choices"][0]["message"]["content"] for response in responses]
    assert {json.loads(text)["fruit"] for text in texts} <= {"apple", "pear"}


def test_unknown_fields_are_ignored(url):
    response = send(url, {"model": BASE, "messages": USER, "max_tokens": 1, "unknown": {"x": [1, 2]}})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": "x" * 7 * MEBIBYTE},
        {"messages": [{"role": "user", "content": ""}] * 20_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * MEBIBYTE}]}]},
    ],
    ids=["answer", "messages", "parts"],
)
def test_score_of_a_long_text_is_rejected_before_tokenization(url, fields):
    response = send(url, {"model": BASE, "messages": USER, "answer": "An apple."} | fields, "/v1/score")
    assert response.status_code == 400
    assert "too long" in response.json()["error"]["message"]


def test_websockets_are_closed(url):
    headers = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert httpx.get(f"{url}/v1/realtime", headers=headers, timeout=60).status_code == 403

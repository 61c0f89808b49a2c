"""Responses on the wire: streams to HTTP/1.0 clients, and answers to prompts that end within a character."""

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.chat_client import BASE, chat
from tests.support.factories import QUESTIONS, TOKENS

SECRET = "The secret word is walnut "
PEPPER = "\U0001f336"


def send_http10(url: str, path: str, body: dict) -> tuple[str, bytes]:
    """Send a request of HTTP/1.0; return the head of the response and its body as sent."""
    address, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode() + data)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.decode("latin-1").lower(), rest


@pytest.mark.parametrize("model", [BASE, f"{BASE}:one"])
def test_http10_client_gets_no_chunks(url, client, model):
    text = chat(client, model, QUESTIONS[0]).choices[0].message.content
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    request = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    head, body = send_http10(url, "/v1/chat/completions", request)
    assert " 200 " in head
    assert "transfer-encoding" not in head
    assert json.loads(body)["choices"][0]["message"]["content"] == text
    head, body = send_http10(url, "/v1/chat/completions", request | {"stream": True})
    assert " 200 " in head
    assert "transfer-encoding" not in head
    *events, end = [line.removeprefix(b"data: ") for line in body.strip().split(b"\n\n")]
    assert end == b"[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == text


@pytest.mark.parametrize("stream", [False, True])
def test_answer_to_half_a_character_does_not_begin_with_the_prompt(url, stream):
    tokenize = {"model": BASE, "prompt": SECRET + PEPPER, "add_special_tokens": False}
    ids = httpx.post(f"{url}/tokenize", json=tokenize, timeout=60).json()["tokens"]
    request = {"model": BASE, "prompt": ids[:-1], "max_tokens": 8, "temperature": 0, "stream": stream}
    body = httpx.post(f"{url}/v1/completions", json=request, timeout=60)
    assert body.status_code == 200
    assert "walnut" not in body.text
    assert "completion_tokens" in body.text or stream

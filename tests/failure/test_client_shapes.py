"""Responses to the calls of OpenAI's and Anthropic's clients: the same fields as from vLLM's own server; slow connections."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.factories import make_prefix
from trimtab.artifacts.prefix import save_prefix
from trimtab.engine.config import EngineConfig
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.util import ports

START_SECONDS = 300
USER = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
FUNCTION = {"name": "set_lamp", "description": "Switch a lamp.", "parameters": SCHEMA}
CHAT, RESPONSE, MESSAGE = "/v1/chat/completions", "/v1/responses", "/v1/messages"
GREEDY = {"temperature": 0}
CHATS = {"messages": USER, "max_tokens": 8} | GREEDY
RESPONSES = {"input": USER[0]["content"], "instructions": "Be brief.", "max_output_tokens": 8} | GREEDY
MESSAGES = {"messages": USER, "system": "Be brief.", "max_tokens": 8} | GREEDY
FORMAT = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA}}
TEXT_FORMAT = {"format": {"type": "json_schema", "name": "lamp", "schema": SCHEMA}}
CALLS = {
    "chat": (CHAT, CHATS),
    "chat, stream": (CHAT, CHATS | {"stream": True, "stream_options": {"include_usage": True}}),
    "chat, two answers": (CHAT, CHATS | {"n": 2}),
    "chat, log-probabilities": (CHAT, CHATS | {"logprobs": True, "top_logprobs": 2}),
    "chat, structured output": (CHAT, CHATS | {"response_format": FORMAT, "max_tokens": 24}),
    "chat, tools": (CHAT, CHATS | {"tools": [{"type": "function", "function": FUNCTION}]}),
    "chat, too long": (CHAT, CHATS | {"messages": [{"role": "user", "content": "word " * 600}]}),
    "completions": ("/v1/completions", {"prompt": "Paris is", "max_tokens": 8} | GREEDY),
    "completions, stream": ("/v1/completions", {"prompt": "Paris is", "max_tokens": 8, "stream": True} | GREEDY),
    "completions, log-probabilities": ("/v1/completions", {"prompt": "Paris is", "max_tokens": 4, "logprobs": 2} | GREEDY),
    "responses": (RESPONSE, RESPONSES),
    "responses, stream": (RESPONSE, RESPONSES | {"stream": True}),
    "responses, structured output": (RESPONSE, RESPONSES | {"text": TEXT_FORMAT, "max_output_tokens": 24}),
    "responses, tools": (RESPONSE, RESPONSES | {"tools": [{"type": "function", "strict": True, **FUNCTION}]}),
    "responses, log-probabilities": (RESPONSE, RESPONSES | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    "messages": (MESSAGE, MESSAGES),
    "messages, stream": (MESSAGE, MESSAGES | {"stream": True}),
    "messages, tools": (MESSAGE, MESSAGES | {"tools": [{"name": "set_lamp", "input_schema": SCHEMA}]}),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": USER}),
}


@pytest.fixture(scope="module")
def vllm_process(base) -> Generator[tuple[str, subprocess.Popen]]:
    """vLLM's server, which starts while trimtab's does."""
    port = ports.find_free_ports()[0]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.path), "--port", str(port)]
    command += ["--served-model-name", base.name, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += [
        "--host",
        "127.0.0.1",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--generation-config",
        "vllm",
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}", process
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def trimtab_url(vllm_process, frozen, base, tmp_path_factory) -> Generator[str]:
    folder = tmp_path_factory.mktemp("shapes")
    run = runs.start_run("shapes", "align", folder)
    for position in ("system", "start"):
        prefix = make_prefix(frozen, base, position, 1, position, 1)
        promote_version(registry.register_version(save_prefix(prefix, folder / position), run.run_id), "test")
    engine = EngineConfig(num_slots=4, dtype="fp32", max_model_len=512)
    with serving(ServeConfig(port=ports.find_free_ports()[0], engine=engine)) as url:
        yield url


@pytest.fixture(scope="module")
def vllm_url(vllm_process, trimtab_url) -> str:
    url, process = vllm_process
    deadline = time.monotonic() + START_SECONDS
    while not is_ready(url):
        assert process.poll() is None, "vLLM's server ended"
        assert time.monotonic() < deadline, "vLLM's server is not ready"
        time.sleep(0.2)
    return url


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def describe_shape(value: Any, path: str = "") -> set[str]:
    """Return the paths of a JSON value with their types, without the field `trimtab` and without tokens as keys."""
    if path.endswith(".top_logprobs[]"):
        return describe_shape(list(value.values()) if isinstance(value, dict) else value, f"{path} by token")
    if isinstance(value, dict):
        fields = {key: item for key, item in value.items() if key != "trimtab"}
        return {f"{path}: object"}.union(*(describe_shape(item, f"{path}.{key}") for key, item in fields.items()))
    if isinstance(value, list):
        return {f"{path}: list"}.union(*(describe_shape(item, f"{path}[]") for item in value))
    return {f"{path}: {type(value).__name__}"}


def request_shapes(url: str, path: str, body: dict[str, Any]) -> dict[str, set[str]]:
    """Return the shapes of a response by event; a complete response has one, with its status."""
    response = httpx.post(f"{url}{path}", json=body, timeout=120)
    if not response.headers["content-type"].startswith("text/event-stream"):
        return {str(response.status_code): describe_shape(response.json())}
    shapes: dict[str, set[str]] = {}
    for event in response.text.strip().split("\n\n"):
        name, _, data = event.rpartition("data: ")
        shape = describe_shape(json.loads(data)) if data.startswith("{") else {data}
        shapes.setdefault(name.strip(), set()).update(shape)
    return shapes


@pytest.mark.parametrize(("path", "body"), CALLS.values(), ids=CALLS)
def test_response_has_the_fields_of_vllm(vllm_url, trimtab_url, base, path, body):
    expected = request_shapes(vllm_url, path, body | {"model": base.name})
    prefix = "start" if path == "/v1/completions" else "system"
    assert request_shapes(trimtab_url, path, body | {"model": f"{base.name}:{prefix}"}) == expected


def test_models_have_the_fields_of_vllm(vllm_url, trimtab_url):
    expected, models = (httpx.get(f"{url}/v1/models", timeout=30).json() for url in (vllm_url, trimtab_url))
    assert models["object"] == expected["object"]
    # `permission` is a field of an older API; no client reads it.
    assert all(expected["data"][0].keys() - {"permission"} <= model.keys() for model in models["data"])


def test_connection_without_a_complete_request_is_closed(trimtab_url):
    address = urlsplit(trimtab_url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received == b"" or b" 408 " in received.splitlines()[0]

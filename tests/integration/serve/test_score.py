"""Scores of supplied answers (`POST /v1/score`)."""

import json

import httpx
import pytest

from tests.support.chat_client import BASE
from tests.support.factories import QUESTIONS
from trimtab.model.chat_template import build_renderer

USER = [{"role": "user", "content": QUESTIONS[0]}]


def test_scores_given_answers(url, client, base, compute_expected_risk):
    answer = "The capital of France is Paris."
    body = {"model": BASE, "messages": USER, "answer": answer}
    response = httpx.post(f"{url}/v1/score", json=body, timeout=60).json()
    ids = build_renderer(base, 8).render_answer(answer)
    assert response["trimtab"]["detectors"][0]["probability"] == pytest.approx(
        compute_expected_risk(QUESTIONS[0], ids), abs=2e-3
    )
    assert response["usage"]["total_tokens"] > len(ids)
    steered = httpx.post(f"{url}/v1/score", json=body | {"model": f"{BASE}:one"}, timeout=60).json()
    assert steered["model"] == f"{BASE}:one@1"
    assert steered["trimtab"]["detectors"][0]["probability"] != response["trimtab"]["detectors"][0]["probability"]
    empty = httpx.post(f"{url}/v1/score", json=body | {"answer": ""}, timeout=60).json()
    assert empty["trimtab"]["detectors"][0]["status"] == "scored"


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Lima"}'}}
TOOL_TURNS = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "It is in Peru."},
]
PARTS = [{"type": "text", "text": text} for text in ("Be brief.", "Where is Lima?")]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": PARTS}],
        [{"role": "system", "content": PARTS[:1]}, {"role": "user", "content": "Where is Lima?"}],
        [{"role": "user", "content": "Where is Lima?"}, *TOOL_TURNS],
    ],
    ids=["parts", "system parts", "tool turns"],
)
@pytest.mark.parametrize("model", [BASE, f"{BASE}:one"])
def test_scores_conversations_that_chat_accepts(url, messages, model):
    request = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    chat_response = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=60).json()
    answer = chat_response["choices"][0]["message"]["content"]
    score_request = {"model": model, "messages": messages, "answer": answer}
    score_response = httpx.post(f"{url}/v1/score", json=score_request, timeout=60).json()
    assert score_response["trimtab"]["detectors"][0]["status"] == "scored"
    # The scored answer ends with the end of the turn, which an answer cut by max_tokens lacks.
    extra = score_response["usage"]["total_tokens"] - chat_response["usage"]["total_tokens"]
    assert extra == (1 if chat_response["choices"][0]["finish_reason"] == "length" else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "answer must be the text"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "each message must have a content, or tool_calls"),
        ({"messages": [{"content": "x"}]}, "must be an object with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be scored"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "tool_calls must be"),
        ({"answer": "<|trimtab_slot_0|>"}, "slot token"),
        ({"answer": "word " * 600}, "tokens; the engine takes 511"),
        ({"model": "gpt-4"}, "no model 'gpt-4'; this server has smollm2-135m and its prefixes"),
    ],
)
def test_score_rejects_invalid_requests(url, change, message):
    response = httpx.post(f"{url}/v1/score", json={"model": BASE, "messages": USER, "answer": "Paris."} | change, timeout=60)
    assert response.status_code == (404 if "model" in change else 400)
    assert message in response.json()["error"]["message"]


def test_score_accepts_json_only(url):
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "answer": "y"})
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(f"{url}/v1/score", content=body, headers={"content-type": content_type}, timeout=60)
        assert response.status_code == 400
        assert "content-type must be application/json" in response.json()["error"]["message"]


def test_server_without_keys_answers_local_names_only(url):
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}, timeout=60).status_code == 403
    assert httpx.get(f"{url}/v1/models", headers={"host": "localhost"}, timeout=60).status_code == 200

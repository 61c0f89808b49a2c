"""Requests that try to put slot tokens into a prompt or an answer: rejected, or without effect."""

import base64

import httpx
import pytest

from tests.support.chat_client import BASE
from trimtab.model.chat_template import build_renderer

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FIRST_SLOT_ID = 49152
SLOT_TOKEN = "<|trimtab_slot_0|>"
USER = [{"role": "user", "content": "Say it."}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": f'{{"x": "{SLOT_TOKEN}"}}'}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": SLOT_TOKEN, "parameters": {"type": "object", "properties": {}}},
}

REQUESTS = {
    "user": (CHATS, {"messages": [{"role": "user", "content": SLOT_TOKEN}]}),
    "system": (CHATS, {"messages": [{"role": "system", "content": SLOT_TOKEN}, *USER]}),
    "developer": (CHATS, {"messages": [{"role": "developer", "content": SLOT_TOKEN}, *USER]}),
    "assistant": (CHATS, {"messages": [*USER, {"role": "assistant", "content": SLOT_TOKEN}, *USER]}),
    "tool": (CHATS, {"messages": [*USER, {"role": "tool", "tool_call_id": "1", "content": SLOT_TOKEN}]}),
    "part": (CHATS, {"messages": [{"role": "user", "content": [{"type": "text", "text": SLOT_TOKEN}]}]}),
    "two parts": (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<|trimtab_", "row_0|>")]}]},
    ),
    "role": (CHATS, {"messages": [{"role": SLOT_TOKEN, "content": "x"}]}),
    "name": (CHATS, {"messages": [{"role": "user", "name": SLOT_TOKEN, "content": "x"}]}),
    "tool call arguments": (CHATS, {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, *USER]}),
    "tool description": (CHATS, {"messages": USER, "tools": [TOOL], "tool_choice": "none"}),
    "template arguments": (
        CHATS,
        {"messages": USER, "chat_template_kwargs": {"messages": [{"role": "user", "content": SLOT_TOKEN}]}},
    ),
    "chat template": (CHATS, {"messages": USER, "chat_template": SLOT_TOKEN}),
    "documents": (CHATS, {"messages": USER, "documents": [{"title": SLOT_TOKEN, "text": SLOT_TOKEN}]}),
    "continued message": (
        CHATS,
        {
            "messages": [*USER, {"role": "assistant", "content": SLOT_TOKEN}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "text": (COMPLETIONS, {"prompt": SLOT_TOKEN}),
    "several texts": (COMPLETIONS, {"prompt": ["x", f"y{SLOT_TOKEN}"]}),
    "ids": (COMPLETIONS, {"prompt": [1, FIRST_SLOT_ID]}),
    "several ids": (COMPLETIONS, {"prompt": [[1, 2], [FIRST_SLOT_ID + 1]]}),
    "ids beyond": (COMPLETIONS, {"prompt": [1, FIRST_SLOT_ID + 100_000]}),
    "ids below": (COMPLETIONS, {"prompt": [-1, 5]}),
    "echo": (COMPLETIONS, {"prompt": [FIRST_SLOT_ID], "echo": True, "logprobs": 1}),
    "suffix": (COMPLETIONS, {"prompt": "x", "suffix": SLOT_TOKEN}),
    "embeddings": (COMPLETIONS, {"prompt": None, "prompt_embeds": base64.b64encode(b"x" * 64).decode()}),
    "responses": ("/v1/responses", {"input": SLOT_TOKEN}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": SLOT_TOKEN}]}),
    "tokenize": ("/tokenize", {"prompt": SLOT_TOKEN}),
    "score, a message": ("/v1/score", {"messages": [{"role": "user", "content": SLOT_TOKEN}], "answer": "x"}),
    "score, the answer": ("/v1/score", {"messages": USER, "answer": SLOT_TOKEN}),
    "look-alike characters": (
        CHATS,
        {"messages": [{"role": "user", "content": "\uff1c|trimtab_slot_0|\uff1e \uff1c\uff5ctrimtab_slot_0\uff5c>"}]},
    ),
    "zero-width space": (CHATS, {"messages": [{"role": "user", "content": "<|trimtab_slot\u200b_0|>"}]}),
    "request with a prefix": (CHATS, {"model": f"{BASE}:two", "messages": [{"role": "user", "content": SLOT_TOKEN}]}),
    "bias": (CHATS, {"messages": USER, "logit_bias": {str(FIRST_SLOT_ID): 100}}),
    "allowed tokens": (CHATS, {"messages": USER, "allowed_token_ids": [FIRST_SLOT_ID]}),
    "stop token": (CHATS, {"messages": USER, "stop_token_ids": [FIRST_SLOT_ID]}),
    "bad words": (CHATS, {"messages": USER, "bad_words": [SLOT_TOKEN]}),
    "stop string": (CHATS, {"messages": USER, "stop": [SLOT_TOKEN]}),
    "prompt log-probs": (CHATS, {"messages": USER, "prompt_logprobs": 5}),
    "engine argument": (CHATS, {"messages": USER, "vllm_xargs": {"trimtab_answer_from": 0}}),
    "engine argument as text": (CHATS, {"messages": USER, "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "engine argument of completions": (COMPLETIONS, {"prompt": "x", "vllm_xargs": {"trimtab_answer_from": 1.5}}),
    "engine argument of responses": ("/v1/responses", {"input": "x", "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "engine argument of messages": ("/v1/messages", {"messages": USER, "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "cache salt": (CHATS, {"messages": USER, "cache_salt": "x"}),
    "structured output": (
        CHATS,
        {
            "messages": USER,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [SLOT_TOKEN]}}},
        },
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_no_request_reaches_slot_tokens(url, base, case):
    """Each request is rejected, or has no slot token in its prompt, its answer and the top log-probs."""
    path, body = REQUESTS[case]
    request = {"model": BASE, "max_tokens": 12, "temperature": 0} | body
    request |= {"return_token_ids": True}
    request |= {"logprobs": True, "top_logprobs": 3} if path == CHATS else {"logprobs": 3}
    response = httpx.post(f"{url}{path}", json=request, timeout=120)
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
        return
    answer = response.json()
    assert path in (CHATS, COMPLETIONS)
    first_slot = build_renderer(base, 4).first_slot
    ids = [*(answer.get("prompt_token_ids") or []), *(answer["choices"][0].get("token_ids") or [])]
    assert ids
    slot_ids = [token_id for token_id in ids if token_id >= first_slot]
    assert len(slot_ids) == (1 if request["model"] == f"{BASE}:two" else 0)
    logprobs = answer["choices"][0].get("logprobs") or {}
    top_tokens = [token["token"] for step in logprobs.get("content") or [] for token in step["top_logprobs"]]
    top_tokens += [token for step in logprobs.get("top_logprobs") or [] for token in step]
    assert top_tokens
    assert not [token for token in top_tokens if "trimtab_slot" in token]


def test_engine_answers_after_all_requests(url):
    response = httpx.post(f"{url}{CHATS}", json={"model": BASE, "messages": USER, "max_tokens": 4}, timeout=60)
    assert response.status_code == 200

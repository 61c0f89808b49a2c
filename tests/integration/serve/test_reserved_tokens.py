"""Ways to get a prefix's row tokens into a prompt, or out of an answer: all are refused, or do no harm."""

import base64

import httpx
import pytest

from tests.support.chat_client import BASE
from trimtab.model.chat_template import build_renderer

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESERVED = 49152
ROW = "<|trimtab_slot_0|>"
USER = [{"role": "user", "content": "Say it."}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": f'{{"x": "{ROW}"}}'}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": ROW, "parameters": {"type": "object", "properties": {}}},
}

WAYS = {
    "user": (CHATS, {"messages": [{"role": "user", "content": ROW}]}),
    "system": (CHATS, {"messages": [{"role": "system", "content": ROW}, *USER]}),
    "developer": (CHATS, {"messages": [{"role": "developer", "content": ROW}, *USER]}),
    "assistant": (CHATS, {"messages": [*USER, {"role": "assistant", "content": ROW}, *USER]}),
    "tool": (CHATS, {"messages": [*USER, {"role": "tool", "tool_call_id": "1", "content": ROW}]}),
    "part": (CHATS, {"messages": [{"role": "user", "content": [{"type": "text", "text": ROW}]}]}),
    "two parts": (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<|trimtab_", "row_0|>")]}]},
    ),
    "role": (CHATS, {"messages": [{"role": ROW, "content": "x"}]}),
    "name": (CHATS, {"messages": [{"role": "user", "name": ROW, "content": "x"}]}),
    "a call's arguments": (CHATS, {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, *USER]}),
    "a tool's description": (CHATS, {"messages": USER, "tools": [TOOL], "tool_choice": "none"}),
    "template arguments": (CHATS, {"messages": USER, "chat_template_kwargs": {"messages": [{"role": "user", "content": ROW}]}}),
    "a template": (CHATS, {"messages": USER, "chat_template": ROW}),
    "documents": (CHATS, {"messages": USER, "documents": [{"title": ROW, "text": ROW}]}),
    "a message to go on with": (
        CHATS,
        {
            "messages": [*USER, {"role": "assistant", "content": ROW}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "text": (COMPLETIONS, {"prompt": ROW}),
    "several texts": (COMPLETIONS, {"prompt": ["x", f"y{ROW}"]}),
    "ids": (COMPLETIONS, {"prompt": [1, RESERVED]}),
    "several ids": (COMPLETIONS, {"prompt": [[1, 2], [RESERVED + 1]]}),
    "ids beyond": (COMPLETIONS, {"prompt": [1, RESERVED + 100_000]}),
    "ids below": (COMPLETIONS, {"prompt": [-1, 5]}),
    "an echo": (COMPLETIONS, {"prompt": [RESERVED], "echo": True, "logprobs": 1}),
    "suffix": (COMPLETIONS, {"prompt": "x", "suffix": ROW}),
    "embeddings": (COMPLETIONS, {"prompt": None, "prompt_embeds": base64.b64encode(b"x" * 64).decode()}),
    "responses": ("/v1/responses", {"input": ROW}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": ROW}]}),
    "tokenize": ("/tokenize", {"prompt": ROW}),
    "score, a message": ("/v1/score", {"messages": [{"role": "user", "content": ROW}], "answer": "x"}),
    "score, the answer": ("/v1/score", {"messages": USER, "answer": ROW}),
    "look-alikes": (
        CHATS,
        {"messages": [{"role": "user", "content": "\uff1c|trimtab_slot_0|\uff1e \uff1c\uff5ctrimtab_slot_0\uff5c>"}]},
    ),
    "a zero-width space": (CHATS, {"messages": [{"role": "user", "content": "<|trimtab_slot\u200b_0|>"}]}),
    "another's prefix": (CHATS, {"model": f"{BASE}:two", "messages": [{"role": "user", "content": ROW}]}),
    "bias": (CHATS, {"messages": USER, "logit_bias": {str(RESERVED): 100}}),
    "allowed tokens": (CHATS, {"messages": USER, "allowed_token_ids": [RESERVED]}),
    "a stop token": (CHATS, {"messages": USER, "stop_token_ids": [RESERVED]}),
    "words that are bad": (CHATS, {"messages": USER, "bad_words": [ROW]}),
    "a stop string": (CHATS, {"messages": USER, "stop": [ROW]}),
    "log-probs of the prompt": (CHATS, {"messages": USER, "prompt_logprobs": 5}),
    "an argument of the engine": (CHATS, {"messages": USER, "vllm_xargs": {"trimtab_answer_from": 0}}),
    "the same, as text": (CHATS, {"messages": USER, "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "the same, of completions": (COMPLETIONS, {"prompt": "x", "vllm_xargs": {"trimtab_answer_from": 1.5}}),
    "the same, of responses": ("/v1/responses", {"input": "x", "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "the same, of messages": ("/v1/messages", {"messages": USER, "vllm_xargs": {"trimtab_answer_from": "x"}}),
    "another's cache": (CHATS, {"messages": USER, "cache_salt": "x"}),
    "an answer in a form": (
        CHATS,
        {
            "messages": USER,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [ROW]}}},
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_reaches_a_row(url, base, way):
    """Refused as bad input; or answered, with no row in the prompt's ids, in the answer's, or among its likely tokens."""
    path, body = WAYS[way]
    request = {"model": BASE, "max_tokens": 12, "temperature": 0} | body
    if path == CHATS:
        request |= {"return_token_ids": True, "logprobs": True, "top_logprobs": 3}
    reply = httpx.post(f"{url}{path}", json=request, timeout=120)
    assert reply.status_code in (200, 400, 404, 422), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]
        return
    said = reply.json()
    assert path in (CHATS, COMPLETIONS)
    first_slot = build_renderer(base, 4).first_slot
    ids = [*(said.get("prompt_token_ids") or []), *(said["choices"][0].get("token_ids") or [])]
    assert ids or path == COMPLETIONS
    rows = [i for i in ids if i >= first_slot]
    assert len(rows) == (1 if request["model"] == f"{BASE}:two" else 0)
    likely = [
        t["token"] for each in (said["choices"][0].get("logprobs") or {}).get("content") or [] for t in each["top_logprobs"]
    ]
    assert not [token for token in likely if "trimtab_slot" in token]


def test_the_engine_answers_as_before(url):
    """After all of them: nobody's trick has hurt it."""
    reply = httpx.post(f"{url}{CHATS}", json={"model": BASE, "messages": USER, "max_tokens": 4}, timeout=60)
    assert reply.status_code == 200

"""Protocols of the server: responses, streams, withheld answers, stateful fields and error formats."""

import json

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.risks import STEERING, make_risk
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.protocols.completions import ChatProtocol, CompletionsProtocol
from trimtab.engine.protocols.errors import build_error_body, build_error_event
from trimtab.engine.protocols.messages import CountTokensProtocol, MessagesProtocol
from trimtab.engine.protocols.protocol import Annotation, parse_event
from trimtab.engine.protocols.responses import ResponsesProtocol
from trimtab.errors import UsageError

REFUSAL = RequestOptions(policy="refuse", refusal_text="I would rather not say.")


def annotate(**risks):
    return Annotation("base", STEERING, make_risk(**risks))


def make_response():
    """A complete response of two output items, as OpenAI's API defines it."""
    text = {"type": "output_text", "text": "Bread is baked.", "annotations": [], "logprobs": None}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    arguments = '{"on":true}'
    call = {"id": "fc_1", "call_id": "call_1", "type": "function_call", "name": "set_lamp", "arguments": arguments}
    usage = {"input_tokens": 4, "output_tokens": 3, "total_tokens": 7}
    usage |= {
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "base",
        "status": "completed",
        "incomplete_details": None,
        "instructions": "Be brief.",
        "output": [message, call | {"status": "completed"}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }


def make_message():
    """A complete message of three content blocks, as Anthropic's API defines it."""
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "text", "text": "Bread is baked."},
        {"type": "tool_use", "id": "call_1", "name": "set_lamp", "input": {"on": True}},
    ]
    usage = {"input_tokens": 4, "output_tokens": 3}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "base", "content": blocks}
    return message | {"stop_reason": "end_turn", "stop_sequence": None, "usage": usage}


def read_events(stream: bytes) -> list[dict]:
    events = [parse_event(event) for event in stream.split(b"\n\n")[:-1]]
    assert all(event is not None and event.name == event.data["type"] for event in events)
    return [event.data for event in events if event]


@pytest.mark.parametrize(("protocol", "body"), [(ResponsesProtocol(), make_response()), (MessagesProtocol(), make_message())])
def test_complete_response_has_version_and_trimtab_field(protocol, body):
    rewritten = protocol.rewrite_response(body, annotate(c0=0.75))
    assert rewritten["model"] == "base:calm@3"
    assert rewritten["trimtab"]["prefix"] == {"name": "calm", "version": 3, "run_id": "run"}
    assert rewritten["trimtab"]["detectors"][0]["probability"] == 0.75
    assert {key: value for key, value in rewritten.items() if key not in ("model", "trimtab")} == {
        key: value for key, value in body.items() if key != "model"
    }


def test_number_of_tokens_passes_unchanged():
    assert CountTokensProtocol().rewrite_response({"input_tokens": 4}, annotate()) == {"input_tokens": 4}


def test_stream_of_a_response_is_what_openai_defines():
    body = ResponsesProtocol().rewrite_response(make_response(), annotate(c0=0.75))
    events = read_events(ResponsesProtocol().build_stream(body, usage=False))
    adapter = TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        adapter.validate_python(event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["model"] == "base:calm@3"
    assert "trimtab" not in events[0]["response"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == "Bread is baked."
    assert "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta")) == '{"on":true}'
    assert events[-1] == {"type": "response.completed", "response": body, "sequence_number": len(events) - 1}
    assert Response.model_validate(events[-1]["response"]).output_text == "Bread is baked."


def test_stream_of_a_message_is_what_anthropic_defines():
    body = MessagesProtocol().rewrite_response(make_message(), annotate(c0=0.75))
    events = read_events(MessagesProtocol().build_stream(body, usage=False))
    for event in events:
        TypeAdapter(RawMessageStreamEvent).validate_python(event)
    assert events[0]["message"]["content"] == []
    assert (events[0]["message"]["model"], events[0]["message"]["stop_reason"]) == ("base:calm@3", None)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "Hm."},
        {"type": "signature_delta", "signature": "s"},
        {"type": "text_delta", "text": "Bread is baked."},
        {"type": "input_json_delta", "partial_json": '{"on": true}'},
    ]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3
    assert events[-1] == {"type": "message_stop", "trimtab": body["trimtab"]}


def test_events_of_a_response_stream():
    first = b'event: response.created\ndata: {"type":"response.created","response":{"model":"base","status":"in_progress"}}'
    inner = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"\\"model\\":\\"base\\""}'
    last = b'event: response.completed\ndata: {"type":"response.completed","response":{"model":"base"}}'
    protocol, running = ResponsesProtocol(), Annotation("base", STEERING, make_risk(running=True, c0=0.4))
    assert read_events(protocol.rewrite_event(first, annotate()) + b"\n\n")[0]["response"] == {
        "model": "base:calm@3",
        "status": "in_progress",
    }
    assert protocol.rewrite_event(inner, annotate(c0=0.4)) == inner
    (scored,) = read_events(protocol.rewrite_event(inner, running) + b"\n\n")
    assert scored["trimtab"]["detectors"][0]["probability"] == 0.4
    assert scored["delta"] == '"model":"base"'
    (end,) = read_events(protocol.rewrite_event(last, annotate(c0=0.75)) + b"\n\n")
    assert end["response"]["model"] == "base:calm@3"
    assert end["response"]["trimtab"]["detectors"][0]["flagged"] is True
    assert protocol.rewrite_event(b": comment", running) == b": comment"


def test_events_of_a_message_stream():
    first = b'event: message_start\ndata: {"type":"message_start","message":{"model":"base","content":[]}}'
    inner = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"text":"x"}}'
    last = b'event: message_stop\ndata: {"type":"message_stop"}'
    failed = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"gone"}}'
    protocol, running = MessagesProtocol(), Annotation("base", STEERING, make_risk(running=True, c0=0.4))
    (start,) = read_events(protocol.rewrite_event(first, annotate()) + b"\n\n")
    assert start["message"] == {"model": "base:calm@3", "content": []}
    assert protocol.rewrite_event(inner, annotate(c0=0.4)) == inner
    (scored,) = read_events(protocol.rewrite_event(inner, running) + b"\n\n")
    assert scored["trimtab"]["detectors"][0]["probability"] == 0.4
    (end,) = read_events(protocol.rewrite_event(last, annotate(c0=0.75)) + b"\n\n")
    assert end["trimtab"]["prefix"]["name"] == "calm"
    (error,) = read_events(protocol.rewrite_event(failed, annotate()) + b"\n\n")
    assert error == {"type": "error", "error": {"type": "api_error", "message": "gone"}}


@pytest.mark.parametrize(("risk", "withheld"), [(0.75, True), (0.25, False)])
def test_policy_refuse_uses_the_terms_of_each_protocol(risk, withheld):
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop", "logprobs": {}}
    chat, message = {"choices": [choice]}, MessagesProtocol().rewrite_response(make_message(), annotate(c0=risk))
    response = ResponsesProtocol().rewrite_response(make_response(), annotate(c0=risk))
    texts = {0: REFUSAL.refusal_text} if withheld else {}
    ChatProtocol().withhold_answers(chat, texts)
    ResponsesProtocol().withhold_answers(response, texts)
    MessagesProtocol().withhold_answers(message, texts)
    assert chat["choices"][0]["trimtab"]["withheld"] == withheld
    assert response["trimtab"]["withheld"] == message["trimtab"]["withheld"] == withheld
    if not withheld:
        assert response["output"] == make_response()["output"]
        assert message["content"] == make_message()["content"]
        return
    assert chat["choices"][0]["finish_reason"] == "content_filter"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert Response.model_validate(response).output_text == REFUSAL.refusal_text
    assert message["stop_reason"] == "refusal"
    assert anthropic.types.Message.model_validate(message).content[0].text == REFUSAL.refusal_text
    last = read_events(ResponsesProtocol().build_stream(response, usage=False))[-1]
    assert last["type"] == "response.incomplete"


@pytest.mark.parametrize(
    "fields",
    [
        {"background": True},
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "p"}},
        {"enable_response_messages": True},
    ],
    ids=str,
)
def test_responses_reject_fields_that_need_a_store(fields):
    with pytest.raises(UsageError, match=f"{next(iter(fields))} is not supported"):
        ResponsesProtocol().prepare_request({"input": "x"} | fields)


def test_responses_are_never_stored():
    assert ResponsesProtocol().prepare_request({"input": "x", "store": True, "background": False})["store"] is False


def test_end_user_of_each_protocol():
    assert CompletionsProtocol().get_user({"user": "ann"}) == "ann"
    assert CompletionsProtocol().get_user({"user": 5}) is None
    assert ResponsesProtocol().get_user({"safety_identifier": "ann"}) == "ann"
    assert MessagesProtocol().get_user({"metadata": {"user_id": "ann"}}) == "ann"
    assert MessagesProtocol().get_user({"metadata": None}) is None


@pytest.mark.parametrize(
    ("status", "openai_type", "anthropic_type"),
    [
        (400, "BadRequestError", "invalid_request_error"),
        (401, "AuthenticationError", "authentication_error"),
        (404, "NotFoundError", "not_found_error"),
        (429, "RateLimitError", "rate_limit_error"),
        (503, "ServiceUnavailableError", "overloaded_error"),
        (500, "InternalServerError", "api_error"),
    ],
)
def test_errors_have_the_format_of_the_path(status, openai_type, anthropic_type):
    openai_error = {"message": "no", "type": openai_type, "param": None, "code": status}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messagesx", "/nowhere"):
        assert build_error_body(path, status, "no") == {"error": openai_error}
    for path in ("/v1/messages", "/v1/messages/", "/v1/messages/count_tokens"):
        assert build_error_body(path, status, "no") == {"type": "error", "error": {"type": anthropic_type, "message": "no"}}


def test_error_events_are_what_the_clients_read():
    chat = build_error_event("/v1/chat/completions", 504, "late")
    assert json.loads(chat.removeprefix(b"data: "))["error"]["message"] == "late"
    (response,) = read_events(build_error_event("/v1/responses", 504, "late"))
    assert TypeAdapter(ResponseStreamEvent).validate_python(response).message == "late"
    (message,) = read_events(build_error_event("/v1/messages", 504, "late"))
    assert message["error"] == {"type": "timeout_error", "message": "late"}


def test_errors_of_vllm_get_anthropics_format():
    vllm = json.dumps({"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}).encode()
    expected = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    assert json.loads(MessagesProtocol().rewrite_error(400, vllm)) == expected
    assert ChatProtocol().rewrite_error(400, vllm) == vllm
    assert MessagesProtocol().rewrite_error(500, b"Internal Server Error") == b"Internal Server Error"

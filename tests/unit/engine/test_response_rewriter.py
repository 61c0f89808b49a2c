"""Rewriting of responses and streams: model name, headers, verdicts, and chunks that pass unchanged."""

import asyncio
import json

import pytest

from tests.support.risks import STEERING, make_risk
from trimtab.engine.detectors.request_risk import EMPTY, RequestRisk
from trimtab.engine.openai.response_rewriter import ResponseRewriter
from trimtab.engine.protocols.completions import ChatProtocol
from trimtab.engine.protocols.protocol import Annotation

JSON_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"9999")]
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]
PREFIX = {"name": "calm", "version": 3, "run_id": "run"}


def rewrite(messages, steering=STEERING, risk=None):
    """Return what the client receives for the messages of the app."""
    sent = []

    async def send(message):
        sent.append(message)

    async def run():
        rewriter = ResponseRewriter(send, ChatProtocol(), Annotation("base", steering, risk or RequestRisk()))
        for message in messages:
            await rewriter(message)

    asyncio.run(run())
    return sent


def build_response(body, status=200):
    data = json.dumps(body).encode()
    return [
        {"type": "http.response.start", "status": status, "headers": JSON_HEADERS},
        {"type": "http.response.body", "body": data[:10], "more_body": True},
        {"type": "http.response.body", "body": data[10:]},
    ]


def build_stream(*parts):
    start = {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
    bodies = [{"type": "http.response.body", "body": part, "more_body": True} for part in parts]
    return [start, *bodies, {"type": "http.response.body", "body": b""}]


def read_stream(sent):
    """Return the body of a stream and its JSON events."""
    body = b"".join(message["body"] for message in sent if message["type"] == "http.response.body")
    lines = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")]
    return body, [json.loads(line) for line in lines if line.startswith(b"{")]


def test_model_name_has_prefix_and_version():
    assert Annotation("base", STEERING, RequestRisk()).model == "base:calm@3"
    assert Annotation("base", None, RequestRisk()).model == "base"


def test_trimtab_field_describes_prefix_and_detectors():
    assert Annotation("base", STEERING, RequestRisk()).build_field()["prefix"] == PREFIX
    field = Annotation("base", None, make_risk(c0=0.75)).build_field()
    assert field["prefix"] is None
    (detector,) = field["detectors"]
    assert (detector["name"], detector["probability"], detector["flagged"]) == ("truth", 0.75, True)


def test_complete_response_has_model_and_trimtab_field():
    body = {"model": "base", "choices": [{"index": 0, "text": "é"}, {"index": 1, "text": "b"}], "usage": {"total_tokens": 3}}
    start, end = rewrite(build_response(body), risk=make_risk(c0=0.25))
    answer = json.loads(end["body"])
    assert (answer["model"], answer["usage"]) == ("base:calm@3", {"total_tokens": 3})
    assert answer["trimtab"]["prefix"] == PREFIX
    assert answer["trimtab"]["detectors"][0]["probability"] == 0.25
    verdict = {"name": "truth", "version": 2, "probability": 0.25, "flagged": False}
    assert answer["choices"][0]["trimtab"] == {"detectors": [verdict]}
    assert "trimtab" not in answer["choices"][1], "a choice without a known risk has no verdict"
    headers = dict(start["headers"])
    assert headers[b"content-length"] == str(len(end["body"])).encode()
    assert len(start["headers"]) == 4
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-trimtab-prefix"] == b"calm@3"
    assert headers[b"x-trimtab-detector"] == b"truth@2"
    assert end["type"] == "http.response.body"
    assert not end.get("more_body")


def test_response_of_the_plain_base_model_has_no_headers_of_trimtab():
    start, end = rewrite(build_response({"model": "base", "choices": []}), steering=None)
    assert [name for name, _ in start["headers"]] == [b"content-type", b"content-length"]
    answer = json.loads(end["body"])
    assert answer["model"] == "base"
    assert answer["trimtab"] == {"prefix": None, "detectors": [EMPTY | {"reason": None}]}


@pytest.mark.parametrize("status", [400, 500])
def test_error_response_keeps_its_body(status):
    error = {"error": {"message": "no"}}
    start, end = rewrite(build_response(error, status))
    assert start["status"] == status
    assert json.loads(end["body"]) == error
    assert dict(start["headers"])[b"content-length"] == str(len(end["body"])).encode()


def test_stream_starts_before_its_first_chunk():
    start = build_stream()[0]
    (sent,) = rewrite([start])
    assert sent["type"] == "http.response.start"
    assert dict(sent["headers"])[b"x-trimtab-prefix"] == b"calm@3"


def test_inner_chunk_changes_in_the_model_name_only():
    event = b'data: {"id":"1","model":"base","choices":[{"index":0,"delta":{"content":"\\"model\\":\\"base\\""}}]}\n\n'
    second = (
        b'data: {"id":"1","model":"base","choices":[{"index":0,"delta":{"content":"\\"model\\":"}}],"x":{"model":"base"}}\n\n'
    )
    body, _ = read_stream(rewrite(build_stream(event, second), risk=make_risk(c0=0.9)))
    assert body == event.replace(b'"base"', b'"base:calm@3"', 1) + second.replace(b'"base"', b'"base:calm@3"', 1)


def test_last_chunk_of_a_choice_has_verdict_and_trimtab_field():
    event = b'data: {"model":"base","choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
    body, (chunk,) = read_stream(rewrite(build_stream(event, b"data: [DONE]\n\n"), risk=make_risk(c0=0.75)))
    assert chunk["model"] == "base:calm@3"
    assert chunk["trimtab"]["prefix"] == PREFIX
    assert chunk["choices"][0]["trimtab"]["detectors"][0]["flagged"] is True
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.startswith(b'data: {"model"')


def test_usage_chunk_has_trimtab_field():
    event = b'data: {"model":"base","choices":[],"usage":{"total_tokens":3}}\n\n'
    _, (chunk,) = read_stream(rewrite(build_stream(event)))
    assert chunk["trimtab"]["prefix"] == PREFIX
    assert chunk["usage"] == {"total_tokens": 3}


def test_running_risks_are_in_inner_chunks():
    event = b'data: {"model":"base","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    _, (chunk,) = read_stream(rewrite(build_stream(event), risk=make_risk(running=True, c0=0.4)))
    assert chunk["choices"][0]["trimtab"]["detectors"][0]["probability"] == 0.4
    assert "trimtab" not in chunk, "only the last chunk of a choice describes the request"
    assert chunk["model"] == "base:calm@3"


def test_error_inside_a_stream_is_not_changed():
    event = b'data: {"error":{"message":"gone","choices":[],"x":{"choices":[]}}}\n\n'
    body, _ = read_stream(rewrite(build_stream(event), risk=make_risk(running=True)))
    assert body == event


def test_events_that_are_not_json_pass_unchanged():
    events = (b': ping "finish_reason":"stop"\n\n', b"data: [DONE]\n\n", b'event: "choices":[]\n\n')
    body, _ = read_stream(rewrite(build_stream(*events), risk=make_risk(running=True)))
    assert body == b"".join(events)


def test_event_that_arrives_in_parts_is_sent_whole():
    event = b'data: {"model":"base","choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
    sent = rewrite(build_stream(event[:20], event[20:50], event[50:] + event[:7], event[7:]))
    assert [len(read_stream([message])[1]) for message in sent[1:]] == [1, 1, 0]
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


def test_rest_without_a_separator_is_sent_at_the_end():
    sent = rewrite([*build_stream(b"data: a\n\ndata: cut")[:2], {"type": "http.response.body", "body": b" off"}])
    assert [message["body"] for message in sent[1:]] == [b"data: a\n\n", b"data: cut off"]
    assert sent[-1]["more_body"] is False


def test_other_messages_pass_through():
    trailers = {"type": "http.response.trailers", "headers": []}
    start = build_stream()[0]
    assert rewrite([start, trailers])[1] is trailers
    body = {"type": "http.response.body", "body": b"x"}
    assert rewrite([body]) == [body], "a body before the start of a response is not rewritten"

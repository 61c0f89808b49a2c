"""Policies on answers in the server: stop, retry and refuse, compared with risks of one transformers pass."""

import anthropic
import openai
import pytest

from tests.support.chat_client import BASE, chat, send_concurrently
from tests.support.factories import QUESTIONS
from trimtab.detection.signals import CHECK_INTERVAL

TOKENS = 24


def apply(*policies, **options):
    return {"extra_body": {"trimtab": {"policies": list(policies)}} | options}


def stop(threshold: float) -> dict:
    return {"detector": "truth", "action": "stop", "threshold": threshold}


def get_entry(response) -> dict:
    """Return the entry of the only policy; the first entry is the detector of the request."""
    return response.model_extra["trimtab"]["detectors"][1]


@pytest.fixture(scope="module")
def checked_risks(url, compute_expected_risk) -> dict[str, list[float]]:
    """Risks of the greedy answer to each question at every `CHECK_INTERVAL` tokens."""
    requests = [(BASE, text) for text in QUESTIONS]
    options = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"return_token_ids": True}}
    answers = [response.choices[0].model_extra["token_ids"] for response in send_concurrently(url, requests, **options)]
    return {
        text: [compute_expected_risk(text, ids[:count]) for count in range(CHECK_INTERVAL, len(ids) + 1, CHECK_INTERVAL)]
        for text, ids in zip(QUESTIONS, answers, strict=True)
    }


def find_stop(risks: list[float], threshold: float) -> int:
    """Number of tokens at the first risk above a threshold; 0 without one."""
    return next((CHECK_INTERVAL * number for number, risk in enumerate(risks, 1) if risk > threshold), 0)


def test_answers_stop_at_the_first_check_above_the_threshold(url, client, checked_risks):
    highest = sorted(max(risks) for risks in checked_risks.values())
    # Between two risks, so that rounding cannot decide.
    threshold = (highest[len(highest) // 2 - 1] + highest[len(highest) // 2]) / 2
    requests = [(BASE, text) for text in QUESTIONS]
    plain = send_concurrently(url, requests, max_tokens=TOKENS, temperature=0)
    responses = send_concurrently(url, requests, max_tokens=TOKENS, temperature=0, **apply(stop(threshold)))
    stopped = 0
    for text, response, whole in zip(QUESTIONS, responses, plain, strict=True):
        tokens, choice = find_stop(checked_risks[text], threshold), response.choices[0]
        if any(abs(risk - threshold) < 2e-3 for risk in checked_risks[text]):
            continue
        entry = get_entry(response)
        assert (entry["name"], entry["subject"], entry["action"]) == ("truth", "answer", "stop" if tokens else None)
        if not tokens:
            assert choice == whole.choices[0]
            continue
        stopped += 1
        assert choice.finish_reason == "content_filter"
        assert response.usage.completion_tokens == tokens
        assert entry["probability"] == pytest.approx(checked_risks[text][tokens // CHECK_INTERVAL - 1], abs=2e-3)
        assert whole.choices[0].message.content.startswith(choice.message.content)
        *chunks, last = chat(client, BASE, text, stream=True, max_tokens=TOKENS, **apply(stop(threshold)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in [*chunks, last]) == choice.message.content
        assert last.choices[0].finish_reason == "content_filter"
        assert get_entry(last)["action"] == "stop"
    assert 0 < stopped < len(QUESTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 2},
        {"extra_body": {"min_tokens": 8, "ignore_eos": True}},
        {"extra_body": {"include_stop_str_in_output": True, "return_token_ids": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    ],
    ids=lambda options: "-".join(options.get("extra_body", options)),
)
def test_answer_is_stopped_with_any_option(client, options):
    body = apply(stop(0.0), **options.get("extra_body", {}))
    options = {key: value for key, value in options.items() if key != "extra_body"} | {"max_tokens": TOKENS}
    response = chat(client, BASE, QUESTIONS[0], **options, **body)
    count = options.get("n", 1)
    assert {choice.finish_reason for choice in response.choices} == {"content_filter"}
    assert response.usage.completion_tokens == count * CHECK_INTERVAL
    reasons = {}
    for chunk in chat(client, BASE, QUESTIONS[0], stream=True, **options, **body):
        reasons |= {choice.index: choice.finish_reason for choice in chunk.choices if choice.finish_reason}
    assert reasons == dict.fromkeys(range(count), "content_filter")


@pytest.mark.parametrize("stream", [False, True])
def test_stops_in_the_terms_of_each_protocol(client, url, stream):
    body = apply(stop(0.0))
    anthropic_client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    arguments = {"model": BASE, "max_tokens": TOKENS, "messages": [{"role": "user", "content": QUESTIONS[0]}], **body}
    if stream:
        with anthropic_client.messages.stream(**arguments) as events:
            message = events.get_final_message()
        with client.responses.stream(model=BASE, input=QUESTIONS[0], max_output_tokens=TOKENS, **body) as events:
            response = list(events)[-1].response
    else:
        message = anthropic_client.messages.create(**arguments)
        response = client.responses.create(model=BASE, input=QUESTIONS[0], max_output_tokens=TOKENS, **body)
    assert message.stop_reason == "refusal"
    assert message.content[0].text
    assert message.usage.output_tokens == CHECK_INTERVAL
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    assert response.output_text
    completion = client.completions.create(model=BASE, prompt="Once upon", max_tokens=TOKENS, **body)
    assert (completion.choices[0].finish_reason, completion.usage.completion_tokens) == ("content_filter", CHECK_INTERVAL)


def test_field_policy_stops_with_the_detector_of_the_request(client):
    own = {"extra_body": {"trimtab": {"policy": "stop", "risk_threshold": 0.0}}}
    response = chat(client, BASE, QUESTIONS[0], **own)
    assert response.choices[0].finish_reason == "content_filter"
    assert get_entry(response)["action"] == "stop"
    with pytest.raises(openai.BadRequestError, match=r"no threshold to stop answers for 0\.05: it was trained without"):
        chat(client, BASE, QUESTIONS[0], extra_body={"trimtab": {"policy": "stop"}})


def test_policies_retry_and_refuse_in_the_place_of_the_field(client):
    refuse = {"detector": "truth", "action": "refuse", "threshold": 0.0, "refusal_text": "no"}
    retry = {"detector": "truth", "action": "retry", "threshold": 0.0, "max_attempts": 2}
    both = chat(client, BASE, QUESTIONS[0], **apply(refuse, retry))
    assert both.choices[0].message.content == "no"
    assert both.model_extra["trimtab"]["attempts"] == 2
    assert [entry["action"] for entry in both.model_extra["trimtab"]["detectors"]] == [None, "refuse", "retry"]
    passed = chat(client, BASE, QUESTIONS[0], **apply(refuse | {"threshold": 1.0}))
    assert passed.choices[0].model_extra["trimtab"]["withheld"] is False
    # Another detector, and none for the request itself.
    off = {"policies": [refuse | {"detector": "other@1"}], "detector": "off"}
    refused = chat(client, BASE, QUESTIONS[0], extra_body={"trimtab": off})
    assert refused.choices[0].message.content == "no"
    with pytest.raises(openai.BadRequestError, match="Send one prompt with n=1"):
        chat(client, BASE, QUESTIONS[0], n=2, temperature=1.0, **apply(retry))


def test_prompt_policies_act_before_those_on_answers(client):
    guard = {"detector": "guard", "action": "refuse", "threshold": 0.0, "refusal_text": "not this"}
    response = chat(client, BASE, QUESTIONS[0], **apply(guard, stop(0.0)))
    assert response.choices[0].message.content == "not this"
    assert response.usage.completion_tokens == 1
    route = {"detector": "guard", "action": "route", "model": f"{BASE}:two", "threshold": 0.0}
    routed = chat(client, BASE, QUESTIONS[0], **apply(route, stop(0.0)))
    assert (routed.model, routed.choices[0].finish_reason) == (f"{BASE}:two@1", "content_filter")

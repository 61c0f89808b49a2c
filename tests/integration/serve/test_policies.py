"""Policies on prompts in the server, compared with risks of one transformers pass."""

import re

import anthropic
import httpx
import openai
import pytest

from tests.integration.serve.conftest import LABELS
from tests.support.chat_client import BASE, chat, send_concurrently
from tests.support.factories import QUESTIONS, compute_prompt_psi, make_label_detector
from trimtab.generation_types import Conversation
from trimtab.types import FIXED_REFUSAL

REFUSAL = "That I will not answer."
REFUSE = {"detector": "guard", "action": "refuse", "refusal_text": REFUSAL}
TEXTS = [*QUESTIONS, *(f"I {'really ' * count}want to know what bread is." for count in (5, 40, 90))]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def apply(*policies, **options):
    return {"extra_body": {"trimtab": {"policies": list(policies)}} | options}


def get_verdict(response, number: int = 1) -> dict:
    """Return the entry of a policy; the first entry is the detector of answers."""
    return response.model_extra["trimtab"]["detectors"][number]


@pytest.fixture(scope="module")
def risks(frozen, base, guard_detector) -> dict[str, float]:
    """Risk of each text without a prefix."""
    conversations = {text: Conversation([{"role": "user", "content": text}]) for text in TEXTS}
    return {
        text: guard_detector.score_prompts(compute_prompt_psi(frozen, base, conversation, (20,))[None]).item()
        for text, conversation in conversations.items()
    }


@pytest.fixture(scope="module")
def flagged(risks, guard_detector) -> str:
    return max(QUESTIONS, key=risks.__getitem__)


@pytest.fixture(scope="module")
def harmless(risks) -> str:
    return min(QUESTIONS, key=risks.__getitem__)


def test_concurrent_verdicts_equal_one_pass(url, client, risks, guard_detector):
    """Cold and from the prefix cache; the answers are those without a policy."""
    threshold = guard_detector.card.thresholds["balanced"]
    plain = send_concurrently(url, [(BASE, text) for text in TEXTS], max_tokens=8, temperature=0)
    for policy in ({"detector": "guard"}, REFUSE):
        responses = send_concurrently(url, [(BASE, text) for text in TEXTS], max_tokens=8, temperature=0, **apply(policy))
        for text, response, unchecked in zip(TEXTS, responses, plain, strict=True):
            verdict, choice = get_verdict(response), response.choices[0]
            assert (verdict["name"], verdict["version"], verdict["subject"]) == ("guard", 1, "prompt")
            assert verdict["probability"] == pytest.approx(risks[text], abs=2e-3)
            is_flagged = risks[text] > threshold
            assert verdict["flagged"] == is_flagged
            assert verdict["action"] == (policy.get("action", "annotate") if is_flagged else None)
            refused = is_flagged and policy is REFUSE
            assert choice.message.content == (REFUSAL if refused else unchecked.choices[0].message.content)
            assert choice.finish_reason == ("content_filter" if refused else unchecked.choices[0].finish_reason)
            assert response.usage.completion_tokens == (1 if refused else unchecked.usage.completion_tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 2},
        {"extra_body": {"min_tokens": 5, "ignore_eos": True}},
        {"extra_body": {"include_stop_str_in_output": True, "stop_token_ids": [3]}},
        {"extra_body": {"return_token_ids": True, "echo": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": "auto"},
        {"stop": ["a"], "seed": 3, "presence_penalty": 1.0},
    ],
    ids=lambda options: "-".join(options.get("extra_body", options)),
)
def test_flagged_prompt_is_refused_with_any_option(client, flagged, options):
    body = apply(REFUSE, **options.get("extra_body", {}))
    options = {key: value for key, value in options.items() if key != "extra_body"}
    response = chat(client, BASE, flagged, **options, **body)
    assert [choice.message.content for choice in response.choices] == [REFUSAL] * options.get("n", 1)
    assert {choice.finish_reason for choice in response.choices} == {"content_filter"}
    assert not response.choices[0].message.tool_calls
    texts: dict[int, str] = {}
    for chunk in chat(client, BASE, flagged, stream=True, **options, **body):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            assert choice.finish_reason in (None, "content_filter")
    assert list(texts.values()) == [REFUSAL] * options.get("n", 1)
    assert get_verdict(chunk)["action"] == "refuse"


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_in_the_terms_of_each_protocol(client, url, flagged, harmless, stream):
    body = apply(REFUSE)
    anthropic_client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    for text, refused in ((flagged, True), (harmless, False)):
        arguments = {"model": BASE, "max_tokens": 6, "messages": [{"role": "user", "content": text}], **body}
        if stream:
            with anthropic_client.messages.stream(**arguments) as events:
                message = events.get_final_message()
            with client.responses.stream(model=BASE, input=text, max_output_tokens=6, **body) as events:
                response = events.get_final_response() if not refused else list(events)[-1].response
        else:
            message = anthropic_client.messages.create(**arguments)
            response = client.responses.create(model=BASE, input=text, max_output_tokens=6, **body)
        assert ("".join(block.text for block in message.content) == REFUSAL) == refused
        assert (message.stop_reason == "refusal") == refused
        assert (response.output_text == REFUSAL) == refused
        reason = response.incomplete_details and response.incomplete_details.reason
        assert (reason == "content_filter") == refused


def test_only_flagged_prompts_of_a_list_are_refused(client, url, flagged, harmless):
    prompts = [render_chat(url, text) for text in (harmless, flagged, harmless)]
    options = {"model": BASE, "prompt": prompts, "max_tokens": 5, "temperature": 0}
    plain = client.completions.create(**options)
    refused = client.completions.create(**options, **apply(REFUSE))
    expected = [plain.choices[0].text, REFUSAL, plain.choices[2].text]
    assert [choice.text for choice in refused.choices] == expected
    assert [choice.finish_reason for choice in refused.choices] == ["length", "content_filter", "length"]
    texts = ["", "", ""]
    for chunk in client.completions.create(**options, stream=True, **apply(REFUSE)):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def render_chat(url: str, text: str) -> list[int]:
    """Return the token ids of a conversation."""
    body = {"model": BASE, "messages": [{"role": "user", "content": text}], "add_generation_prompt": True}
    return httpx.post(f"{url}/tokenize", json=body, timeout=60).json()["tokens"]


@pytest.mark.parametrize("target", [f"{BASE}:two", f"{BASE}:one@1", BASE])
def test_flagged_prompt_is_routed_to_another_model(client, flagged, harmless, target):
    route = apply({"detector": "guard", "action": "route", "model": target})
    direct, routed = chat(client, target, flagged), chat(client, f"{BASE}:three", flagged, **route)
    assert routed.choices[0].message.content == direct.choices[0].message.content
    assert routed.model == direct.model
    assert get_verdict(routed)["action"] == "route"
    chunks = list(chat(client, f"{BASE}:three", flagged, stream=True, **route))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == direct.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {direct.model}
    stays = list(chat(client, f"{BASE}:three", harmless, stream=True, **route))
    assert {chunk.model for chunk in stays} == {f"{BASE}:three@1"}


@pytest.mark.parametrize("side", ["above", "below"])
def test_conditional_prefix_steers_one_side(client, flagged, harmless, side):
    model = f"{BASE}:only-{side}@1"
    for text in (flagged, harmless):
        steered = (text == flagged) == (side == "above")
        direct, conditional = chat(client, f"{BASE}:two" if steered else BASE, text), chat(client, model, text)
        assert conditional.choices[0].message.content == direct.choices[0].message.content
        assert conditional.model == (model if steered else BASE)
        assert get_verdict(conditional)["action"] == ("route" if steered else None)
        chunks = list(chat(client, model, text, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == direct.choices[0].message.content
        assert {chunk.model for chunk in chunks} == {conditional.model}
    refused = chat(client, model, flagged, **apply(REFUSE))
    assert refused.choices[0].message.content == REFUSAL
    with pytest.raises(openai.BadRequestError, match="cannot be checked for requests with use_beam_search"):
        chat(client, model, flagged, n=2, extra_body={"use_beam_search": True})


def test_conditional_prefix_refuses_the_other_side(client, flagged, harmless):
    model = f"{BASE}:refusing@1"
    refused = chat(client, model, flagged)
    assert refused.choices[0].message.content == FIXED_REFUSAL
    assert refused.choices[0].finish_reason == "content_filter"
    chunks = list(chat(client, model, flagged, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == FIXED_REFUSAL
    steered = chat(client, model, harmless)
    assert steered.choices[0].message.content == chat(client, f"{BASE}:two", harmless).choices[0].message.content
    assert steered.model == model


def test_prefix_does_not_change_the_verdict_of_a_policy_that_acts(url, client, three_prefixes, risks, guard_detector):
    """The detector was trained without a prefix, and reads the prompt without it; the answers are those with the prefix."""
    threshold = guard_detector.card.thresholds["balanced"]
    requests = [(f"{BASE}:{prefix.card.name}@1", text) for prefix in three_prefixes for text in QUESTIONS]
    plain = send_concurrently(url, requests, max_tokens=6, temperature=0)
    responses = send_concurrently(url, requests, max_tokens=6, temperature=0, **apply(REFUSE))
    for (model, text), response, unchecked in zip(requests, responses, plain, strict=True):
        verdict = get_verdict(response)
        assert verdict["probability"] == pytest.approx(risks[text], abs=2e-3)
        assert verdict["warning"] is None
        is_flagged = risks[text] > threshold
        assert response.model == (BASE if is_flagged else model)
        assert response.choices[0].message.content == (REFUSAL if is_flagged else unchecked.choices[0].message.content)
    annotated = get_verdict(chat(client, f"{BASE}:one@1", QUESTIONS[0], **apply({"detector": "guard"})))
    assert annotated["warning"] == "the detector was fitted without a prefix"


def test_strictest_action_wins(client, flagged):
    route = {"detector": "guard", "action": "route", "model": f"{BASE}:two"}
    never = REFUSE | {"refusal_text": "never", "threshold": 1.0}
    later = REFUSE | {"refusal_text": "later"}
    response = chat(client, f"{BASE}:one", flagged, **apply({"detector": "guard"}, never, route, REFUSE, later))
    assert response.choices[0].message.content == REFUSAL
    assert response.model == BASE
    actions = [get_verdict(response, number)["action"] for number in range(1, 6)]
    assert actions == ["annotate", None, "route", "refuse", "refuse"]


def test_answer_policies_respect_refusals(client, flagged):
    """A refused prompt has no answer that could be retried, or withheld again."""
    for policy in ("refuse", "retry"):
        response = chat(client, BASE, flagged, extra_body={"trimtab": {"policies": [REFUSE], "policy": policy}})
        assert response.choices[0].message.content == REFUSAL
        assert response.model_extra["trimtab"].get("attempts", 1) == 1


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ({"detector": "nope"}, openai.NotFoundError, "no detector 'nope'"),
        ({"detector": "truth", "action": "route", "model": BASE}, openai.BadRequestError, "detector 'truth' reads answers"),
        (
            {"detector": "guard", "false_positive_rate": 0.1},
            openai.BadRequestError,
            "no threshold for 0.1; it has 0.05, balanced",
        ),
        (
            {"detector": "guard", "action": "stop"},
            openai.BadRequestError,
            "whose actions are annotate, route, refuse; not stop",
        ),
        ({"detector": "guard", "action": "allow"}, openai.BadRequestError, r"trimtab.policies\[0\].action is invalid"),
        ({"detector": "guard", "x": 1}, openai.BadRequestError, r"trimtab.policies\[0\].x is invalid"),
        ({"detector": "guard", "action": "route"}, openai.BadRequestError, "model is the target of action route"),
        ({"detector": "guard", "action": "route", "model": f"{BASE}:nope"}, openai.NotFoundError, "no prefix 'nope'"),
        ({"detector": "guard", "action": "route", "model": "other"}, openai.NotFoundError, "no model 'other'"),
    ],
)
def test_invalid_policies_are_rejected(client, policy, error, message):
    with pytest.raises(error, match=message):
        chat(client, BASE, "Hi", **apply(policy))


@pytest.mark.parametrize(
    "change",
    [
        {"use_beam_search": True, "n": 2},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
    ],
    ids=lambda change: "-".join(change),
)
def test_requests_that_cannot_be_checked_are_rejected(client, change):
    with pytest.raises(openai.BadRequestError, match=r"a policy .*cannot check"):
        chat(client, BASE, "Hi", **apply(REFUSE, **change))
    passed = chat(client, BASE, "Hi", **apply(REFUSE | {"unchecked": "pass"}, **change))
    assert get_verdict(passed)["status"] == "unavailable"
    assert passed.choices[0].message.content


def test_prompts_at_whose_end_no_answer_starts_are_rejected(client):
    """Raw text, token ids, and an answer that the client has begun."""
    for prompt in ("How do I", [1, 2, 3]):
        with pytest.raises(openai.BadRequestError, match="a policy cannot check a prompt at whose end no answer starts"):
            client.completions.create(model=BASE, prompt=prompt, max_tokens=2, **apply(REFUSE))
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, here is", "status": "incomplete"}]
    with pytest.raises(openai.BadRequestError, match="at whose end no answer starts"):
        client.responses.create(model=BASE, input=begun, max_output_tokens=2, **apply(REFUSE))
    passed = client.completions.create(model=BASE, prompt="How do I", max_tokens=2, **apply({"detector": "guard"}))
    assert (get_verdict(passed)["status"], get_verdict(passed)["probability"]) == ("unavailable", None)


def test_clients_cannot_send_checks_or_name_a_guard_as_detector_of_answers(client):
    with pytest.raises(openai.BadRequestError, match="trimtab_prompt_checks is not a request argument"):
        chat(client, BASE, "Hi", extra_body={"vllm_xargs": {"trimtab_prompt_checks": "x"}})
    with pytest.raises(openai.BadRequestError, match="detector 'guard' reads prompts"):
        chat(client, BASE, "Hi", extra_body={"trimtab": {"detector": "guard"}})


def test_moderations(client, url, risks, guard_detector):
    response = client.moderations.create(input=TEXTS)
    scores = [result.category_scores.model_dump()["guard"] for result in response.results]
    assert scores == pytest.approx([risks[text] for text in TEXTS], abs=2e-3)
    threshold = guard_detector.card.thresholds["balanced"]
    assert [result.flagged for result in response.results] == [risks[text] > threshold for text in TEXTS]
    strict = client.moderations.create(
        input=TEXTS[0], extra_body={"trimtab": {"policies": [{"detector": "guard@1", "threshold": 1}]}}
    )
    assert not strict.results[0].flagged
    for body, message in (
        ({"input": []}, "input must be a text"),
        ({"input": [1]}, "input must be a text"),
        ({"input": "word " * 600}, "the engine takes 511"),
        ({"input": "x", "trimtab": {"policies": [REFUSE]}}, "Use action annotate"),
    ):
        rejected = httpx.post(f"{url}/v1/moderations", json=body, timeout=60)
        assert rejected.status_code == 400
        assert message in rejected.json()["error"]["message"]


def test_refused_requests_leave_no_running_request_and_are_counted(client, url, flagged):
    chat(client, BASE, flagged, **apply(REFUSE))
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    running = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert [float(value) for value in running] == [0.0]
    assert re.search(r'trimtab_policy_verdicts_total\{action="refuse",detector="guard",detector_version="1"', metrics)


def test_labels_of_one_detector_are_categories_and_policies(client, frozen, base, guard_detector):
    """Both labels are scored in one pass; the detector as a whole has the risk of the riskiest label."""
    topics = make_label_detector(frozen, base, "topics", (20,), LABELS)
    states = {
        text: compute_prompt_psi(frozen, base, Conversation([{"role": "user", "content": text}]), (20,)) for text in TEXTS
    }
    expected = {
        label: [topics.select_label(label).score_prompts(states[text][None]).item() for text in TEXTS]
        for label in (*LABELS, None)
    }
    assert expected[None] == [max(pair) for pair in zip(*(expected[label] for label in LABELS), strict=True)]
    extra = {"trimtab": {"policies": [{"detector": "topics@candidate"}]}}
    results = client.moderations.create(input=TEXTS, extra_body=extra).results
    for label in LABELS:
        scores = [result.category_scores.model_dump()[label] for result in results]
        assert scores == pytest.approx(expected[label], abs=2e-3)
    number = max(range(len(TEXTS)), key=lambda n: expected[LABELS[0]][n] - expected[LABELS[1]][n])
    policies = [{"detector": "topics@1", "action": "refuse", "label": label, "refusal_text": label} for label in LABELS]
    response = chat(client, BASE, TEXTS[number], **apply(*policies, {"detector": "topics@1"}))
    entries = response.model_extra["trimtab"]["detectors"][1:]
    assert [entry["label"] for entry in entries] == [*LABELS, None]
    assert [entry["probability"] for entry in entries] == pytest.approx(
        [expected[k][number] for k in (*LABELS, None)], abs=2e-3
    )
    assert response.choices[0].message.content == LABELS[0]
    with pytest.raises(openai.BadRequestError, match="detector 'topics' has personal/data, travel; not label 'x'"):
        chat(client, BASE, "Hi", **apply({"detector": "topics@1", "label": "x"}))
    with pytest.raises(openai.BadRequestError, match="detector 'guard' has no labels; not label 'x'"):
        chat(client, BASE, "Hi", **apply({"detector": "guard", "label": "x"}))

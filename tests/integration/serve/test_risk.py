"""Risks in the server's responses: those of one transformers pass, in every form that responses have."""

import re
import time
from contextlib import ExitStack

import httpx
import openai
import pytest
from jsonschema import validate

from tests.support import ROOT
from tests.support.chat_client import BASE, chat, together
from tests.support.factories import QUESTIONS, one_pass
from trimtab.engine.openai.openapi import COMPONENTS
from trimtab.generation_types import Conversation
from trimtab.model.chat_template import build_renderer
from trimtab.serve.traffic_command import TrafficConfig, run_traffic

LAYERS = (20, 29)
DASHBOARD = ROOT / "deploy" / "grafana.json"
USER = [{"role": "user", "content": QUESTIONS[0]}]


def with_options(**options):
    return {"extra_body": {"trimtab": options}}


def get_verdict(reply) -> dict:
    """The detector's entry in the response, which must have the documented form."""
    field = reply.model_extra["trimtab"]
    validate(field, {"$ref": "#/components/schemas/ResponseField", "components": {"schemas": COMPONENTS}})
    return field["detectors"][0]


def get_probability(choice) -> float | None:
    """The probability of a choice; None in a chunk without one."""
    detectors = (choice.model_extra or {}).get("trimtab", {}).get("detectors", [])
    return detectors[0]["probability"] if detectors else None


@pytest.fixture(scope="module")
def expected(frozen, base, watcher):
    """The risk of an answer, given as token ids, by one pass of transformers."""
    renderer = build_renderer(base, 8)
    return lambda text, ids, prefix=None: watcher.score_answer(
        one_pass(frozen, renderer, Conversation([{"role": "user", "content": text}], prefix), ids, LAYERS), LAYERS
    )


def test_risks_are_those_of_one_pass_for_many_requests_in_flight(url, three, expected):
    """With and without prefixes, of many lengths, cold and from the prefix cache."""
    texts = [*QUESTIONS, *(f"I {'really ' * count}want to know what bread is." for count in (5, 40, 90))]
    cases = [(text, prefix) for text in texts for prefix in (None, *three[:2])]
    models = [(f"{BASE}:{prefix.card.name}@1" if prefix else BASE, text) for text, prefix in cases]
    flagged = set()
    for _ in range(2):
        replies = together(url, models, max_tokens=24, temperature=0, extra_body={"return_token_ids": True})
        for (text, prefix), reply in zip(cases, replies, strict=True):
            detector, choice = get_verdict(reply), reply.choices[0]
            risk = expected(text, choice.model_extra["token_ids"], prefix)
            assert detector["status"] == "scored"
            assert detector["probability"] == pytest.approx(risk, abs=2e-3)
            assert detector["flagged"] == (detector["probability"] > detector["threshold"])
            assert (detector["name"], detector["version"], detector["false_positive_rate"]) == ("truth", 1, 0.05)
            keys = ("name", "version", "probability", "flagged")
            assert choice.model_extra["trimtab"] == {"detectors": [{key: detector[key] for key in keys}]}
            assert (detector["warning"] is not None) == (prefix is not None)
            flagged.add(detector["flagged"])
    assert flagged == {True, False}


def test_streams_end_with_the_risk_and_show_it_on_their_way(client):
    whole = get_verdict(chat(client, BASE, QUESTIONS[1]))
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, BASE, QUESTIONS[1], stream=True, **usage))
    assert get_verdict(chunks[-1]) == whole
    assert [c for c in chunks if c.choices and "trimtab" in (c.choices[0].model_extra or {})] == [chunks[-2]]
    running = list(chat(client, BASE, QUESTIONS[1], stream=True, **with_options(running_risk=True)))
    risks = [risk for c in running if (risk := get_probability(c.choices[0])) is not None]
    assert len(risks) > 3
    assert len(set(risks)) > 2
    assert all(0 <= risk <= 1 for risk in risks)
    assert risks[-1] == get_verdict(running[-1])["probability"] == pytest.approx(whole["probability"], abs=1e-3)
    assert "".join(c.choices[0].delta.content or "" for c in running) == "".join(
        c.choices[0].delta.content or "" for c in chunks if c.choices
    )


def test_each_choice_has_its_own(client, expected):
    options = {"temperature": 1.2, "seed": 3, "n": 3, "extra_body": {"return_token_ids": True}}
    reply = chat(client, BASE, QUESTIONS[2], **options)
    risks = [get_probability(choice) for choice in reply.choices]
    assert len(set(risks)) == 3
    assert risks == pytest.approx([expected(QUESTIONS[2], c.model_extra["token_ids"]) for c in reply.choices], abs=2e-3)
    assert get_verdict(reply)["probability"] == risks[0]
    chunks = list(chat(client, BASE, QUESTIONS[2], stream=True, temperature=1.2, seed=3, n=3))
    ends = {c.choices[0].index: get_probability(c.choices[0]) for c in chunks if c.choices[0].finish_reason}
    assert [ends[index] for index in range(3)] == pytest.approx(risks, abs=1e-3)


def test_answers_cut_by_a_stop_or_after_a_token(client, expected):
    token_ids = {"extra_body": {"return_token_ids": True}}
    for options in ({"stop": ["a"]}, {"max_tokens": 1}, {"max_tokens": 2}):
        reply = chat(client, BASE, QUESTIONS[0], **options, **token_ids)
        assert get_verdict(reply)["probability"] == pytest.approx(
            expected(QUESTIONS[0], reply.choices[0].model_extra["token_ids"]), abs=2e-3
        ), options


def test_text_completions_of_several_prompts(client):
    reply = client.completions.create(model=BASE, prompt=["The capital of France is", "Once"], max_tokens=6, temperature=0)
    alone = client.completions.create(model=BASE, prompt="Once", max_tokens=6, temperature=0)
    assert len({get_probability(choice) for choice in reply.choices}) == 2
    assert get_probability(reply.choices[1]) == pytest.approx(get_verdict(alone)["probability"], abs=1e-3)


def test_a_detector_is_chosen_by_name_or_switched_off(client, watcher):
    off = get_verdict(chat(client, BASE, "Hi", **with_options(detector="off")))
    assert {key: value for key, value in off.items() if value is not None} == {
        "subject": "answer",
        "status": "off",
        "reason": "the request disabled detection",
    }
    other = get_verdict(chat(client, BASE, "Hi", **with_options(detector="other@1")))
    assert (other["status"], other["name"]) == ("scored", "other")
    assert other["probability"] != get_verdict(chat(client, BASE, "Hi"))["probability"]
    with pytest.raises(openai.NotFoundError, match=r"no detector 'nope' for smollm2-135m; there are: .*truth"):
        chat(client, BASE, "Hi", **with_options(detector="nope"))
    with pytest.raises(openai.NotFoundError, match="detector 'other' has no 'champion'; it has @candidate, @1"):
        chat(client, BASE, "Hi", **with_options(detector="other"))
    listed = {m.id: m for m in client.models.list()}
    assert listed[BASE].model_extra["trimtab"]["detectors"]["truth"] == {"candidate": 1, "champion": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (5, "trimtab must be an object"),
        ({"detektor": "truth"}, "trimtab.detektor is not a known field; known fields: detector"),
        ({"detector": 5}, "trimtab.detector must be a name"),
        ({"false_positive_rate": 0.2}, "trimtab.false_positive_rate must be 0.01, 0.05 or 0.1"),
        ({"false_positive_rate": [1]}, "trimtab.false_positive_rate must be"),
        ({"running_risk": "yes"}, "trimtab.running_risk must be true or false"),
        ({"policy": "panic"}, "trimtab.policy must be annotate, refuse, retry"),
        ({"risk_threshold": 2}, "trimtab.risk_threshold must be a risk from 0 to 1"),
        ({"max_attempts": 0}, "trimtab.max_attempts must be from 1 to 8"),
        ({"max_attempts": True}, "trimtab.max_attempts must be from 1 to 8"),
        ({"policy": "refuse", "detector": "off"}, "needs a detector: the request disabled detection"),
    ],
)
def test_options_that_cannot_be_are_400(url, options, message):
    body = {"model": BASE, "messages": USER, "max_tokens": 2, "trimtab": options}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_an_answer_that_is_too_risky_is_withheld(client):
    kept = chat(client, BASE, QUESTIONS[0], **with_options(policy="refuse", risk_threshold=1.0))
    assert kept.choices[0].message.content == chat(client, BASE, QUESTIONS[0]).choices[0].message.content
    assert kept.choices[0].model_extra["trimtab"]["withheld"] is False
    withheld = chat(
        client, BASE, QUESTIONS[0], **with_options(policy="refuse", risk_threshold=0.0, refusal_text="Ask a librarian.")
    )
    assert withheld.choices[0].message.content == "Ask a librarian."
    assert withheld.choices[0].finish_reason == "content_filter"
    assert get_verdict(withheld)["probability"] == get_verdict(kept)["probability"]


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_stream_under_a_policy_comes_when_it_is_judged(client, limit):
    """What it adds up to is the answer that the same request without a stream gets."""
    options = with_options(policy="refuse", risk_threshold=limit)
    whole = chat(client, BASE, QUESTIONS[0], **options)
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, BASE, QUESTIONS[0], stream=True, **usage, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].choices[0].model_extra["trimtab"] == whole.choices[0].model_extra["trimtab"]
    assert chunks[-1].usage == whole.usage
    text = list(client.completions.create(model=BASE, prompt="Once", max_tokens=6, temperature=0, stream=True, **options))
    assert text[0].choices[0].text
    assert text[-1].choices[0].finish_reason == ("content_filter" if limit == 0 else "length")


def test_the_least_risky_of_several_answers_is_given(client):
    first = chat(client, BASE, QUESTIONS[4])
    best = chat(client, BASE, QUESTIONS[4], **with_options(policy="retry", risk_threshold=0.0, max_attempts=4))
    assert best.model_extra["trimtab"]["attempts"] == 4
    assert get_verdict(best)["probability"] <= get_verdict(first)["probability"]
    assert best.usage.completion_tokens > first.usage.completion_tokens
    once = chat(client, BASE, QUESTIONS[4], **with_options(policy="retry", risk_threshold=1.0))
    assert once.model_extra["trimtab"]["attempts"] == 1
    assert once.choices[0].message.content == first.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="Send one prompt with n=1"):
        chat(client, BASE, QUESTIONS[4], n=2, temperature=1.0, **with_options(policy="retry"))
    with pytest.raises(openai.BadRequestError, match="Send one prompt with n=1"):
        client.completions.create(model=BASE, prompt=["a", "b"], max_tokens=2, **with_options(policy="retry"))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_each_share_of_false_positive_rate_has_its_threshold(client, watcher, share):
    found = get_verdict(chat(client, BASE, QUESTIONS[0], **with_options(false_positive_rate=share)))
    assert found["false_positive_rate"] == share
    assert found["threshold"] == watcher.card.thresholds[f"{share}"]


def test_given_answers_are_scored(url, client, base, expected):
    answer = "The capital of France is Paris."
    body = {"model": BASE, "messages": USER, "answer": answer}
    reply = httpx.post(f"{url}/v1/score", json=body, timeout=60).json()
    ids = build_renderer(base, 8).render_answer(answer)
    assert reply["trimtab"]["detectors"][0]["probability"] == pytest.approx(expected(QUESTIONS[0], ids), abs=2e-3)
    assert reply["usage"]["total_tokens"] > len(ids)
    steered = httpx.post(f"{url}/v1/score", json=body | {"model": f"{BASE}:one"}, timeout=60).json()
    assert steered["model"] == f"{BASE}:one@1"
    assert steered["trimtab"]["detectors"][0]["probability"] != reply["trimtab"]["detectors"][0]["probability"]
    empty = httpx.post(f"{url}/v1/score", json=body | {"answer": ""}, timeout=60).json()
    assert empty["trimtab"]["detectors"][0]["status"] == "scored"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "answer must be the text"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "must have a role and a content that are strings"),
        ({"answer": "<|trimtab_slot_0|>"}, "slot token"),
        ({"answer": "word " * 600}, "tokens; the engine takes 511"),
        ({"model": "gpt-4"}, "no model 'gpt-4'; this server has smollm2-135m and its prefixes"),
    ],
)
def test_what_cannot_be_scored_is_get_verdict(url, change, message):
    reply = httpx.post(f"{url}/v1/score", json={"model": BASE, "messages": USER, "answer": "Paris."} | change, timeout=60)
    assert reply.status_code == (404 if "model" in change else 400)
    assert message in reply.json()["error"]["message"]


def counted(url: str) -> dict[str, float]:
    """The server's metrics, by name with labels."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


LONG = {"messages": USER, "max_tokens": 400, "ignore_eos": True}


def at_rest(url: str) -> None:
    """Wait until the engine runs nothing."""
    deadline = time.monotonic() + 60
    while sum(value for name, value in counted(url).items() if name.startswith("vllm:num_requests_running")):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("options", [{}, {"trimtab": {"policy": "retry", "risk_threshold": 0.0}}, {"model": f"{BASE}:one"}])
def test_clients_that_do_not_wait_for_a_whole_answer_free_the_engine_too(url, options):
    def written() -> float:
        return sum(value for name, value in counted(url).items() if name.startswith("vllm:generation_tokens_total"))

    # The first request to a server takes longer than the client below waits.
    warm = httpx.post(f"{url}/v1/chat/completions", json={"model": BASE, **LONG, "max_tokens": 1}, timeout=120)
    assert warm.status_code == 200
    before = written()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={"model": BASE, **LONG, **options}, timeout=1.5)
    at_rest(url)
    assert 0 < written() - before < 400 / 2


def test_clients_that_go_away_free_the_engine(url):
    """Eight long streams, left after their first piece."""
    plain = 'trimtab_tokens_total{mode="answer",prefix="none",version="0"}'
    before = counted(url).get(plain, 0)
    body = {"model": BASE, **LONG, "stream": True}
    with ExitStack() as opened:
        for _ in range(8):
            request = body | {"trimtab": {"running_risk": True}}
            reply = opened.enter_context(httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=120))
            next(reply.iter_lines())
    at_rest(url)
    assert counted(url)[plain] - before < 8 * 400 / 2


def test_metrics_count_by_prefix_and_detector(url, client):
    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    before = counted(url)
    whole = chat(client, f"{BASE}:two", QUESTIONS[0])
    list(chat(client, f"{BASE}:two", QUESTIONS[0], stream=True))
    chat(client, BASE, "Hi", **with_options(detector="off"))
    with pytest.raises(openai.NotFoundError):
        chat(client, f"{BASE}:nope", "Hi")
    after = counted(url)
    two = 'mode="answer",prefix="two"'
    plain = 'mode="answer",prefix="none"'
    assert grown(f'trimtab_requests_total{{{two},status="200",version="1"}}') == 2
    assert grown(f'trimtab_requests_total{{{plain},status="404",version="0"}}') == 1
    assert grown(f'trimtab_tokens_total{{{two},version="1"}}') == 2 * whole.usage.completion_tokens
    assert grown(f'trimtab_first_token_seconds_count{{{two},version="1"}}') == 1
    assert grown(f'trimtab_risk_count{{detector="truth",detector_version="1",{two},version="1"}}') == 2
    assert grown(f'trimtab_unchecked_total{{{plain},status="off",version="0"}}') == 1
    assert after["trimtab_slots_used"] >= 3
    assert after["trimtab_versions_refused"] == 0
    # Every figure of the dashboard is one that the server has.
    names = {name.partition("{")[0] for name in after}
    shown = set(re.findall(r"(?:trimtab_|vllm:)[a-z_]+", DASHBOARD.read_text()))
    assert len(shown) > 10
    assert shown <= names


def test_traffic_is_shared_and_shadowed(url, client):
    models = {user: chat(client, f"{BASE}:four", "Hi", user=user, max_tokens=2).model for user in map(str, range(12))}
    assert set(models.values()) == {f"{BASE}:four@1", f"{BASE}:four@2"}
    assert models == {user: chat(client, f"{BASE}:four", "Hi", user=user, max_tokens=2).model for user in models}
    assert chat(client, f"{BASE}:four@champion", "Hi", max_tokens=2).model == f"{BASE}:four@1"
    deadline = time.monotonic() + 60
    while True:
        lines = {(line["version"], line["mode"]): line for line in run_traffic(TrafficConfig(url)) if line["prefix"] == "four"}
        if lines.get(("2", "shadow"), {}).get("requests", 0) >= 20:
            break
        assert time.monotonic() < deadline
    assert lines["1", "answer"]["requests"] + lines["2", "answer"]["requests"] == 25
    assert 0 <= lines["2", "shadow"]["risk"] <= 1

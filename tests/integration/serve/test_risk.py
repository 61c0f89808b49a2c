"""Risks in the server's responses, compared with those of one transformers pass."""

import re
import time
from contextlib import ExitStack

import httpx
import openai
import pytest
from jsonschema import validate

from tests.support import ROOT
from tests.support.chat_client import BASE, chat, send_concurrently
from tests.support.factories import QUESTIONS
from trimtab.engine.openai.openapi import COMPONENTS
from trimtab.serve.traffic_command import TrafficConfig, run_traffic

LAYERS = (20, 29)
DASHBOARD, ALERTS = ROOT / "deploy" / "grafana.json", ROOT / "deploy" / "alerts.yaml"
USER = [{"role": "user", "content": QUESTIONS[0]}]


def with_options(**options):
    return {"extra_body": {"trimtab": options}}


def get_verdict(response) -> dict:
    """Return the detector's entry in a response, after a check of its schema."""
    field = response.model_extra["trimtab"]
    validate(field, {"$ref": "#/components/schemas/ResponseField", "components": {"schemas": COMPONENTS}})
    return field["detectors"][0]


def get_probability(choice) -> float | None:
    """Return the probability of a choice, or None for a chunk without one."""
    detectors = (choice.model_extra or {}).get("trimtab", {}).get("detectors", [])
    return detectors[0]["probability"] if detectors else None


def test_concurrent_risks_equal_one_pass(url, three_prefixes, compute_expected_risk):
    """With and without prefixes, of many lengths, cold and from the prefix cache."""
    texts = [*QUESTIONS, *(f"I {'really ' * count}want to know what bread is." for count in (5, 40, 90))]
    cases = [(text, prefix) for text in texts for prefix in (None, *three_prefixes[:2])]
    models = [(f"{BASE}:{prefix.card.name}@1" if prefix else BASE, text) for text, prefix in cases]
    flagged = set()
    for _ in range(2):
        responses = send_concurrently(url, models, max_tokens=24, temperature=0, extra_body={"return_token_ids": True})
        for (text, prefix), response in zip(cases, responses, strict=True):
            detector, choice = get_verdict(response), response.choices[0]
            risk = compute_expected_risk(text, choice.model_extra["token_ids"], prefix)
            assert detector["status"] == "scored"
            assert detector["probability"] == pytest.approx(risk, abs=2e-3)
            assert detector["flagged"] == (detector["probability"] > detector["threshold"])
            assert (detector["name"], detector["version"], detector["false_positive_rate"]) == ("truth", 1, 0.05)
            keys = ("name", "version", "probability", "flagged")
            assert choice.model_extra["trimtab"] == {"detectors": [{key: detector[key] for key in keys}]}
            assert (detector["warning"] is not None) == (prefix is not None)
            flagged.add(detector["flagged"])
    assert flagged == {True, False}


def test_stream_ends_with_the_risk_and_can_show_running_risks(client):
    verdict = get_verdict(chat(client, BASE, QUESTIONS[1]))
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, BASE, QUESTIONS[1], stream=True, **usage))
    assert get_verdict(chunks[-1]) == verdict
    assert [chunk for chunk in chunks if chunk.choices and "trimtab" in (chunk.choices[0].model_extra or {})] == [chunks[-2]]
    running = list(chat(client, BASE, QUESTIONS[1], stream=True, **with_options(running_risk=True)))
    risks = [risk for chunk in running if (risk := get_probability(chunk.choices[0])) is not None]
    assert len(risks) > 3
    assert len(set(risks)) > 2
    assert all(0 <= risk <= 1 for risk in risks)
    assert risks[-1] == get_verdict(running[-1])["probability"] == pytest.approx(verdict["probability"], abs=1e-3)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in running) == "".join(
        chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices
    )


def test_each_choice_has_its_own_risk(client, compute_expected_risk):
    options = {"temperature": 1.2, "seed": 3, "n": 3, "extra_body": {"return_token_ids": True}}
    response = chat(client, BASE, QUESTIONS[2], **options)
    risks = [get_probability(choice) for choice in response.choices]
    assert len(set(risks)) == 3
    assert risks == pytest.approx(
        [compute_expected_risk(QUESTIONS[2], choice.model_extra["token_ids"]) for choice in response.choices], abs=2e-3
    )
    assert get_verdict(response)["probability"] == risks[0]
    chunks = list(chat(client, BASE, QUESTIONS[2], stream=True, temperature=1.2, seed=3, n=3))
    final = {chunk.choices[0].index: get_probability(chunk.choices[0]) for chunk in chunks if chunk.choices[0].finish_reason}
    assert [final[index] for index in range(3)] == pytest.approx(risks, abs=1e-3)


@pytest.mark.parametrize("options", [{"stop": ["a"]}, {"max_tokens": 1}, {"max_tokens": 2}])
def test_risk_of_answer_cut_by_stop_or_length(client, compute_expected_risk, options):
    response = chat(client, BASE, QUESTIONS[0], **options, extra_body={"return_token_ids": True})
    token_ids = response.choices[0].model_extra["token_ids"]
    assert get_verdict(response)["probability"] == pytest.approx(compute_expected_risk(QUESTIONS[0], token_ids), abs=2e-3)


def test_risks_of_text_completions_with_several_prompts(client):
    response = client.completions.create(model=BASE, prompt=["The capital of France is", "Once"], max_tokens=6, temperature=0)
    single = client.completions.create(model=BASE, prompt="Once", max_tokens=6, temperature=0)
    assert len({get_probability(choice) for choice in response.choices}) == 2
    assert get_probability(response.choices[1]) == pytest.approx(get_verdict(single)["probability"], abs=1e-3)


def test_detector_is_selected_by_name_or_disabled(client, truth_detector):
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
def test_rejects_invalid_options(url, options, message):
    body = {"model": BASE, "messages": USER, "max_tokens": 2, "trimtab": options}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_withholds_risky_answer(client):
    allowed = chat(client, BASE, QUESTIONS[0], **with_options(policy="refuse", risk_threshold=1.0))
    assert allowed.choices[0].message.content == chat(client, BASE, QUESTIONS[0]).choices[0].message.content
    assert allowed.choices[0].model_extra["trimtab"]["withheld"] is False
    withheld = chat(
        client, BASE, QUESTIONS[0], **with_options(policy="refuse", risk_threshold=0.0, refusal_text="Ask a librarian.")
    )
    assert withheld.choices[0].message.content == "Ask a librarian."
    assert withheld.choices[0].finish_reason == "content_filter"
    assert get_verdict(withheld)["probability"] == get_verdict(allowed)["probability"]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_stream_with_policy_equals_response_without_stream(client, threshold):
    """The stream adds up to the answer of the same request without streaming."""
    options = with_options(policy="refuse", risk_threshold=threshold)
    response = chat(client, BASE, QUESTIONS[0], **options)
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, BASE, QUESTIONS[0], stream=True, **usage, **options))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == response.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == response.choices[0].finish_reason
    assert chunks[-2].choices[0].model_extra["trimtab"] == response.choices[0].model_extra["trimtab"]
    assert chunks[-1].usage == response.usage
    completion = list(client.completions.create(model=BASE, prompt="Once", max_tokens=6, temperature=0, stream=True, **options))
    assert completion[0].choices[0].text
    assert completion[-1].choices[0].finish_reason == ("content_filter" if threshold == 0 else "length")


def test_retry_returns_the_least_risky_answer(client):
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


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_false_positive_rate_selects_the_threshold(client, truth_detector, rate):
    verdict = get_verdict(chat(client, BASE, QUESTIONS[0], **with_options(false_positive_rate=rate)))
    assert verdict["false_positive_rate"] == rate
    assert verdict["threshold"] == truth_detector.card.thresholds[f"{rate}"]


def read_metrics(url: str) -> dict[str, float]:
    """Return the server's metrics by name with labels."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


LONG_REQUEST = {"messages": USER, "max_tokens": 400, "ignore_eos": True}


def wait_until_idle(url: str) -> None:
    """Wait until the engine has no running request."""
    deadline = time.monotonic() + 60
    while sum(value for name, value in read_metrics(url).items() if name.startswith("vllm:num_requests_running")):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("options", [{}, {"trimtab": {"policy": "retry", "risk_threshold": 0.0}}, {"model": f"{BASE}:one"}])
def test_client_timeout_frees_the_engine(url, options):
    def count_generated_tokens() -> float:
        return sum(value for name, value in read_metrics(url).items() if name.startswith("vllm:generation_tokens_total"))

    # The first request to a server takes longer than the client below waits.
    response = httpx.post(f"{url}/v1/chat/completions", json={"model": BASE, **LONG_REQUEST, "max_tokens": 1}, timeout=120)
    assert response.status_code == 200
    before = count_generated_tokens()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={"model": BASE, **LONG_REQUEST, **options}, timeout=1.5)
    wait_until_idle(url)
    assert 0 < count_generated_tokens() - before < 400 / 2


def test_closed_streams_free_the_engine(url):
    """Eight long streams, closed after their first line."""
    counter = 'trimtab_tokens_total{mode="answer",prefix="none",version="0"}'
    before = read_metrics(url).get(counter, 0)
    body = {"model": BASE, **LONG_REQUEST, "stream": True}
    with ExitStack() as streams:
        for _ in range(8):
            request = body | {"trimtab": {"running_risk": True}}
            stream = streams.enter_context(httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=120))
            next(stream.iter_lines())
    wait_until_idle(url)
    assert read_metrics(url)[counter] - before < 8 * 400 / 2


def test_metrics_are_counted_by_prefix_and_detector(url, client):
    def get_increase(name: str) -> float:
        return after[name] - before.get(name, 0)

    before = read_metrics(url)
    response = chat(client, f"{BASE}:two", QUESTIONS[0])
    list(chat(client, f"{BASE}:two", QUESTIONS[0], stream=True))
    chat(client, BASE, "Hi", **with_options(detector="off"))
    chat(client, BASE, "Hi", **with_options(policies=[{"detector": "guard"}]))
    with pytest.raises(openai.NotFoundError):
        chat(client, f"{BASE}:nope", "Hi")
    after = read_metrics(url)
    steered_labels = 'mode="answer",prefix="two"'
    plain_labels = 'mode="answer",prefix="none"'
    assert get_increase(f'trimtab_requests_total{{{steered_labels},status="200",version="1"}}') == 2
    assert get_increase(f'trimtab_requests_total{{{plain_labels},status="404",version="0"}}') == 1
    assert get_increase(f'trimtab_tokens_total{{{steered_labels},version="1"}}') == 2 * response.usage.completion_tokens
    assert get_increase(f'trimtab_first_token_seconds_count{{{steered_labels},version="1"}}') == 1
    assert get_increase(f'trimtab_risk_count{{detector="truth",detector_version="1",{steered_labels},version="1"}}') == 2
    assert get_increase(f'trimtab_unchecked_total{{{plain_labels},status="off",version="0"}}') == 1
    assert after["trimtab_slots_used"] >= 3
    assert after["trimtab_prefix_writes_total"] >= 1
    # Other tests of the session may have registered versions that this server cannot load.
    assert after["trimtab_versions_refused"] == before["trimtab_versions_refused"]
    # Every metric of the dashboard must exist.
    server_names = {name.partition("{")[0] for name in after}
    dashboard_names = set(re.findall(r"(?:trimtab_|vllm:)[a-z_]+", DASHBOARD.read_text()))
    dashboard_names |= set(re.findall(r"trimtab_[a-z_]+", ALERTS.read_text()))
    assert len(dashboard_names) > 10
    assert dashboard_names <= server_names


def test_model_list_shows_the_drift_of_detectors(url, client):
    def read_drift() -> dict:
        base, *_ = httpx.get(f"{url}/v1/models", timeout=30).json()["data"]
        return base["trimtab"]["drift"]

    chat(client, BASE, "Hi", max_tokens=2)
    before = read_drift()["truth@1"]
    chat(client, BASE, "Hi", max_tokens=2)
    after = read_drift()["truth@1"]
    assert after["answers"] == before["answers"] + 1
    assert after["status"] in ("stable", "shifted")
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    assert re.search(r'trimtab_detector_drift\{[^}]*detector="truth"', metrics)


def test_traffic_is_split_and_shadowed(url, client):
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

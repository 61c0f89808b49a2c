"""Signals of live prompts and answers and their labels, from a request to a data set that detectors are trained on."""

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from tests.integration.serve.conftest import LAYERS
from tests.support.factories import compute_prompt_states, compute_reference_signals
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.generation_types import Conversation
from trimtab.model.chat_template import build_renderer

QUESTION = "Which river flows through Cairo?"
SECONDS = 60


def read_datasets(folder: Path, subject: str = "answer") -> list[SignalDataset]:
    datasets = [read_dataset(path) for path in sorted(folder.glob("*-*/")) if list(path.glob("part-*"))]
    return [dataset for dataset in datasets if dataset.meta.subject == subject]


def wait_for_row(folder: Path, key: str) -> tuple[SignalDataset, int]:
    """Return the data set with an answer or a prompt, and the index of its row."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for dataset in read_datasets(folder, "prompt" if key.endswith("/prompt") else "answer"):
            if key in dataset.keys:
                return dataset, dataset.keys.index(key)
        time.sleep(0.1)
    raise AssertionError(f"{key} was not stored within {SECONDS} seconds")


@pytest.fixture
def send(url: str) -> Callable[..., httpx.Response]:
    """Function that sends a chat of QUESTION, and returns the response."""

    def send_chat(**fields) -> httpx.Response:
        body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
        response = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=120)
        assert response.status_code == 200, response.text
        return response

    return send_chat


@pytest.mark.slow
def test_stored_signals_are_those_of_the_answer(send, signals_folder, frozen, base):
    response = send(return_token_ids=True)
    ids = response.json()["choices"][0]["token_ids"]
    dataset, row = wait_for_row(signals_folder, f"{response.headers['x-trimtab-request-id']}/0")
    conversation = Conversation([{"role": "user", "content": QUESTION}])
    expected = compute_reference_signals(frozen, build_renderer(base, 8), conversation, ids, LAYERS)
    assert torch.allclose(dataset.psi[row], expected.psi, rtol=2e-3, atol=2e-2)
    assert torch.allclose(dataset.traces[row], expected.history, rtol=2e-3, atol=1e-2)
    assert (dataset.meta.layers, dataset.meta.prefix_digest) == (LAYERS, None)
    assert (dataset.questions[row], dataset.answers[row]) == ("", "")


@pytest.mark.slow
def test_feedback_labels_an_answer(send, url, signals_folder):
    response = send()
    request_id = response.headers["x-trimtab-request-id"]
    for correct in (False, True):
        stored = httpx.post(f"{url}/v1/feedback", json={"id": request_id, "correct": correct}, timeout=30)
        assert stored.json()["correct"] is correct
    dataset, row = wait_for_row(signals_folder, f"{request_id}/0")
    assert dataset.truthful[row] == 1.0
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    assert 'trimtab_feedback_total{correct="true"}' in metrics
    assert "trimtab_signals_stored_total" in metrics


@pytest.mark.slow
def test_streams_choices_and_prefixes_are_stored(send, url, signals_folder):
    several = send(n=2, temperature=1.0)
    for choice in range(2):
        wait_for_row(signals_folder, f"{several.headers['x-trimtab-request-id']}/{choice}")
    stream = send(stream=True, model="smollm2-135m:one@1")
    dataset, _ = wait_for_row(signals_folder, f"{stream.headers['x-trimtab-request-id']}/0")
    assert dataset.meta.prefix_digest is not None


@pytest.mark.slow
def test_the_answer_that_a_policy_chose_is_stored_once(send, signals_folder):
    policy = {"detector": "truth", "action": "retry", "threshold": 0.0, "max_attempts": 3}
    response = send(temperature=1.0, trimtab={"policies": [policy]})
    key = f"{response.headers['x-trimtab-request-id']}/0"
    dataset, row = wait_for_row(signals_folder, key)
    assert dataset.keys.count(key) == 1
    assert dataset.psi[row].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["none", "refuse", "route"])
def test_stored_prompts_are_those_of_the_request(send, url, signals_folder, frozen, base, action):
    policy = {"detector": "guard", "action": action, "threshold": 0.0} | (
        {"model": "smollm2-135m:one@1"} if action == "route" else {}
    )
    fields = {} if action == "none" else {"trimtab": {"policies": [policy]}}
    request_id = send(**fields).headers["x-trimtab-request-id"]
    dataset, row = wait_for_row(signals_folder, f"{request_id}/prompt")
    renderer, conversation = build_renderer(base, 8), Conversation([{"role": "user", "content": QUESTION}])
    states = compute_prompt_states(frozen, renderer, conversation, LAYERS)
    expected = torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)], -1)
    assert torch.allclose(dataset.psi[row], expected, rtol=2e-3, atol=2e-2)
    assert (dataset.meta.subject, dataset.meta.prefix_digest, dataset.questions[row]) == ("prompt", None, "")
    stored = httpx.post(f"{url}/v1/feedback", json={"id": request_id, "harmful": True}, timeout=30)
    assert stored.json()["harmful"] is True
    dataset, row = wait_for_row(signals_folder, f"{request_id}/prompt")
    assert dataset.truthful[row] == 0.0


@pytest.mark.slow
def test_prompts_at_whose_end_no_answer_starts_are_not_stored(send, url, signals_folder):
    body = {"model": "smollm2-135m", "prompt": QUESTION, "max_tokens": 4}
    completed = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert completed.status_code == 200
    request_id = completed.headers["x-trimtab-request-id"]
    wait_for_row(signals_folder, f"{request_id}/0")
    assert not any(f"{request_id}/prompt" in dataset.keys for dataset in read_datasets(signals_folder, "prompt"))


@pytest.mark.slow
def test_answers_to_refused_prompts_and_scores_are_not_stored(send, url, signals_folder):
    refused = send(trimtab={"policies": [{"detector": "guard", "action": "refuse", "threshold": 0.0}]})
    score = {"model": "smollm2-135m", "messages": [{"role": "user", "content": QUESTION}], "answer": "The Nile."}
    scored = httpx.post(f"{url}/v1/score", json=score, timeout=60)
    last = send()
    # Parts are written in order, so that the others would have been written before.
    wait_for_row(signals_folder, f"{last.headers['x-trimtab-request-id']}/0")
    keys = {key.partition("/")[0] for dataset in read_datasets(signals_folder) for key in dataset.keys}
    assert not keys & {refused.headers["x-trimtab-request-id"], scored.headers["x-trimtab-request-id"]}

"""Feedback endpoint: owners, raters, limits, and labels that survive."""

import asyncio
import json

import httpx
import pytest

from tests.support.api_keys import create_key
from tests.support.asgi_client import upstream_app
from trimtab.detection.live_labels import LabelJournal, read_labels, select_latest
from trimtab.serve.live import feedback
from trimtab.serve.live.answer_ids import open_answer_ids
from trimtab.serve.live.feedback import FeedbackMiddleware
from trimtab.serve.middleware.access_log import AccessLogMiddleware
from trimtab.serve.middleware.authentication import AuthenticationMiddleware

FEEDBACK = "/v1/feedback"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "signals"


@pytest.fixture
def records():
    return []


@pytest.fixture
def app(folder, tmp_path, records):
    ids = open_answer_ids(folder)
    inner = FeedbackMiddleware(upstream_app, ids, LabelJournal(folder, "replica"))
    return AccessLogMiddleware(AuthenticationMiddleware(inner, tmp_path / "keys.json", 8), records.append)


def run_requests(app, *requests):
    """Send requests of (path, token, body), whose body may depend on the responses so far."""

    async def run():
        responses = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for path, token, body in requests:
                content = body(responses) if callable(body) else body
                headers = {"authorization": f"Bearer {token}"} if token else {}
                responses.append(await client.post(path, json=content, headers=headers))
        return responses

    return asyncio.run(run())


def rate(correct, **fields):
    return lambda responses: {"id": responses[0].headers["x-trimtab-request-id"], "correct": correct} | fields


def test_label_of_the_key_that_sent_the_request_is_stored(app, folder, tmp_path, records):
    token = create_key(tmp_path / "keys.json", "alice")
    answered, first, second = run_requests(
        app, ("/v1/answer", token, {}), (FEEDBACK, token, rate(True)), (FEEDBACK, token, rate(False))
    )
    assert (first.status_code, second.status_code) == (200, 200)
    request_id = answered.headers["x-trimtab-request-id"]
    assert first.json() == {"object": "feedback", "id": request_id, "choice": 0, "correct": True, "rater": "alice"}
    labels = read_labels(folder)
    assert [label.correct for label in labels] == [True, False]
    assert select_latest(labels)[f"{request_id}/0"].correct is False
    assert records[0].server_id == request_id


def test_label_of_a_prompt_is_stored(app, folder, tmp_path):
    token = create_key(tmp_path / "keys.json", "alice")

    def about(**fields):
        return lambda responses: {"id": responses[0].headers["x-trimtab-request-id"]} | fields

    answered, stored, both, neither = run_requests(
        app,
        ("/v1/answer", token, {}),
        (FEEDBACK, token, about(harmful=True)),
        (FEEDBACK, token, about(harmful=True, correct=True)),
        (FEEDBACK, token, about()),
    )
    request_id = answered.headers["x-trimtab-request-id"]
    assert stored.json() == {"object": "feedback", "id": request_id, "harmful": True, "rater": "alice"}
    (label,) = read_labels(folder)
    assert (label.key, label.correct) == (f"{request_id}/prompt", False)
    assert (both.status_code, neither.status_code) == (400, 400)
    assert "feedback needs correct" in neither.json()["error"]["message"]


def test_only_the_owner_and_raters_may_label_an_answer(app, folder, tmp_path):
    keys = tmp_path / "keys.json"
    alice, bob = create_key(keys, "alice"), create_key(keys, "bob")
    rater = create_key(keys, "expert", rater=True)
    _, foreign, trusted = run_requests(
        app, ("/v1/answer", alice, {}), (FEEDBACK, bob, rate(True)), (FEEDBACK, rater, rate(False, rater="Ann", choice=2))
    )
    assert foreign.status_code == 403
    assert "did not send the request" in foreign.json()["error"]["message"]
    assert trusted.status_code == 200
    (label,) = read_labels(folder)
    assert (label.rater, label.trusted, label.choice) == ("expert/Ann", True, 2)


def test_server_without_keys_takes_labels(app, folder):
    _, stored = run_requests(app, ("/v1/answer", None, {}), (FEEDBACK, None, rate(True)))
    assert stored.json()["rater"] == "anonymous"
    assert len(read_labels(folder)) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"correct": True}, "id must be the x-trimtab-request-id"),
        ({"id": "req-7", "correct": True}, "id must be the x-trimtab-request-id"),
        ({"id": "a" * 32}, "feedback needs correct (about the answer)"),
        ({"id": "a" * 32, "correct": 1}, "feedback needs correct (about the answer)"),
        ({"id": "a" * 32, "correct": True, "choice": -1}, "choice must be the index"),
        ({"id": "a" * 32, "correct": True, "choice": True}, "choice must be the index"),
        ({"id": "a" * 32, "correct": True, "rater": ""}, "rater must be a name"),
        ({"id": "a" * 32, "correct": True, "text": "x"}, "feedback has no field 'text'"),
    ],
)
def test_invalid_feedback_is_rejected(app, folder, body, message):
    (response,) = run_requests(app, (FEEDBACK, None, body))
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert read_labels(folder) == []


def test_feedback_of_another_site_is_rejected(app, folder):
    """A browser sends text/plain to other sites without asking them."""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answered = await client.post("/v1/answer", json={})
            body = json.dumps({"id": answered.headers["x-trimtab-request-id"], "correct": True})
            return await client.post(FEEDBACK, content=body, headers={"content-type": "text/plain"})

    response = asyncio.run(run())
    assert response.status_code == 400
    assert "content-type must be application/json" in response.json()["error"]["message"]
    assert read_labels(folder) == []


def test_a_key_has_a_limited_number_of_labels(app, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "MOST_PER_HOUR", 2)
    token, rater = create_key(tmp_path / "keys.json", "alice"), create_key(tmp_path / "keys.json", "expert", rater=True)
    labels = [(FEEDBACK, token, rate(True))] * 3 + [(FEEDBACK, rater, rate(True))] * 3
    responses = run_requests(app, ("/v1/answer", token, {}), *labels)
    assert [response.status_code for response in responses[1:]] == [200, 200, 429, 200, 200, 200]
    assert "trimtab keys add NAME --rater true" in responses[3].json()["error"]["message"]


def test_label_that_cannot_be_written_is_not_acknowledged(app, folder):
    (folder / "labels").write_text("a file in the place of the folder")
    _, response = run_requests(app, ("/v1/answer", None, {}), (FEEDBACK, None, rate(True)))
    assert response.status_code == 503
    assert "the label was not stored" in response.json()["error"]["message"]


def test_key_with_limited_models_may_send_feedback(app, tmp_path):
    token = create_key(tmp_path / "keys.json", "alice", models=["m"])
    answered, stored = run_requests(app, ("/v1/answer", token, {"model": "m"}), (FEEDBACK, token, rate(True)))
    assert (answered.status_code, stored.status_code) == (200, 200)


def test_labels_have_neither_text_nor_token(app, folder, tmp_path):
    token = create_key(tmp_path / "keys.json", "alice")
    run_requests(app, ("/v1/answer", token, {"messages": "private"}), (FEEDBACK, token, rate(True)))
    content = "".join(file.read_text() for file in (folder / "labels").iterdir())
    assert "private" not in content
    assert token not in content
    assert set(json.loads(content)) == {"id", "choice", "correct", "rater", "trusted", "at", "subject"}

"""Access log: content of the records and request ids."""

import json

from tests.support.asgi_client import send_requests, upstream_app
from trimtab.engine import asgi
from trimtab.engine.request_context import RequestContext
from trimtab.serve.middleware.access_log import AccessLogMiddleware


def test_record_has_outcome_without_text_by_default():
    records = []
    generated, accepted, invalid = send_requests(
        AccessLogMiddleware(upstream_app, records.append),
        ("/", {}),
        ("/", {"x-request-id": "mine-7"}),
        ("/", {"x-request-id": "a b"}),
    )
    assert [record.id for record in records] == [
        response.headers["x-request-id"] for response in (generated, accepted, invalid)
    ]
    assert records[1].id == "mine-7"
    assert [record.server_id for record in records] == [
        response.headers["x-trimtab-request-id"] for response in (generated, accepted, invalid)
    ]
    assert len({record.server_id for record in records}) == 3
    assert records[2].id != "a b"
    line = records[0].as_json()
    assert (line["status"], line["model"], line["risk"], line["path"]) == (200, "m@1", 0.5, "/")
    assert "detector" not in line
    assert "secret" not in json.dumps(line)
    (response,) = send_requests(AccessLogMiddleware(upstream_app, records.append, with_text=True), ("/", {}))
    assert records[-1].as_json()["text"] == '{"secret": 1}'
    assert response.json() == {"read": 13}


def test_requests_without_a_key_are_not_recorded():
    async def reject(scope, receive, send):
        await asgi.send_json(RequestContext.get(scope, receive, send).send, 401, {})

    records = []
    (response,) = send_requests(AccessLogMiddleware(reject, records.append), ("/" + "x" * 60_000, {}))
    assert response.status_code == 401
    assert records == []


def test_recorded_path_is_short():
    records = []
    send_requests(AccessLogMiddleware(upstream_app, records.append), ("/" + "x" * 60_000, {}))
    assert len(records[0].path) == 200

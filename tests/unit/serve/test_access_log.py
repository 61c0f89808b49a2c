"""The doors in front of a replica's engine: how many may come in, how long they may stay, and what is kept of them."""

import json

from tests.support.asgi_client import asked
from tests.unit.serve.test_admission import slow
from trimtab.serve.middleware.access_log import AccessLogMiddleware


def test_a_record_says_what_answered_and_not_what_was_said():
    kept = []
    first, named, strange = asked(
        AccessLogMiddleware(slow, kept.append), ("/", {}), ("/", {"x-request-id": "mine-7"}), ("/", {"x-request-id": "a b"})
    )
    assert [record.id for record in kept] == [reply.headers["x-request-id"] for reply in (first, named, strange)]
    assert kept[1].id == "mine-7"
    assert kept[2].id != "a b"
    line = kept[0].as_json()
    assert (line["status"], line["model"], line["risk"], line["path"]) == (200, "m@1", 0.5, "/")
    assert "detector" not in line
    assert "secret" not in json.dumps(line)
    (reply,) = asked(AccessLogMiddleware(slow, kept.append, with_text=True), ("/", {}))
    assert kept[-1].as_json()["text"] == '{"secret": 1}'
    assert reply.json() == {"read": 13}

"""The outermost door: every request for an answer leaves a record, for logs and traces. No record holds what was said, unless
it was asked for."""

import json
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.engine.asgi import NOTES, App, Message, Receive, Scope, Send, set_header

REQUEST_ID = b"x-request-id"
FIT = re.compile(r"[\w.:-]{1,64}")
# What is looked at of a request's text, where that is recorded.
MOST_TEXT = 32_768


@dataclass(frozen=True)
class AccessRecord:
    """A request that has ended. `began` and `ended` are in nanoseconds since 1970, `first` in seconds from the beginning to the
    first byte of the response's body; `notes` say what answered and what watched; `parent` is the request's `traceparent`."""

    id: str
    path: str
    status: int
    began: int
    ended: int
    first: float | None
    notes: dict[str, Any]
    text: str | None
    parent: str | None

    def as_json(self) -> dict[str, Any]:
        """One line of a log."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.began / 1e9)) + f".{self.began // 10**6 % 1000:03}Z"
        seconds = round((self.ended - self.began) / 1e9, 4)
        line = {"at": at, "id": self.id, "path": self.path, "status": self.status, "seconds": seconds, "first": self.first}
        return line | self.notes | ({} if self.text is None else {"text": self.text})


class RecordSink(Protocol):
    """Takes records; never waits."""

    def __call__(self, record: AccessRecord) -> None: ...


class AccessLogMiddleware:
    """An ASGI app around another one, that tells a sink of every POST. `with_text` gives it the body of requests too."""

    def __init__(self, app: App, sink: RecordSink, *, with_text: bool = False) -> None:
        self._app = app
        self._sink = sink
        self._with_text = with_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its id is the client's `x-request-id`, else a new one, and stands in the response."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID, b"").decode("latin-1")
        name = given if FIT.fullmatch(given) else uuid.uuid4().hex
        scope = {**scope, "headers": set_header(scope["headers"], REQUEST_ID, name.encode()), NOTES: {}}
        began, clock = time.time_ns(), time.perf_counter()
        status, first, text = 0, None, b""

        async def heard() -> Message:
            nonlocal text
            message = await receive()
            if self._with_text and message["type"] == "http.request" and len(text) < MOST_TEXT:
                text += message.get("body", b"")
            return message

        async def told(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = set_header(message["headers"], REQUEST_ID, name.encode())
            elif first is None and message.get("body"):
                first = round(time.perf_counter() - clock, 4)
            await send(message)

        try:
            await self._app(scope, heard, told)
        finally:
            said = text[:MOST_TEXT].decode(errors="replace") if self._with_text else None
            notes = {key: value for key, value in scope[NOTES].items() if value is not None}
            parent = headers.get(b"traceparent", b"").decode("latin-1") or None
            self._sink(AccessRecord(name, scope["path"], status, began, time.time_ns(), first, notes, said, parent))


def format_record(record: AccessRecord) -> str:
    """A record as a line of JSON."""
    return json.dumps(record.as_json(), ensure_ascii=False)

"""Access-log middleware.

The outermost middleware passes a record of every POST request to a sink. Records contain the request text only if this is
enabled.
"""

import json
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.engine.asgi import NOTES, App, Message, Receive, Scope, Send, set_header

REQUEST_ID = b"x-request-id"
FIT = re.compile(r"[\w.:-]{1,64}")
# Maximum size of the recorded request body (bytes).
MOST_TEXT = 32_768


@dataclass(frozen=True)
class AccessRecord:
    """Record of a request that has ended.

    Attributes:
        id: request id.
        path: path of the URL.
        status: HTTP status of the response, 0 if there was none.
        began: start time (nanoseconds since 1970).
        ended: end time (nanoseconds since 1970).
        first: time from the start to the first byte of the response body (seconds), None without a body.
        notes: annotations of the request, such as model, detector and risk.
        text: start of the request body, None if it is not recorded.
        parent: `traceparent` header of the request.
    """

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
        """Return the record as the JSON object of a log line; times in seconds."""
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.began / 1e9)) + f".{self.began // 10**6 % 1000:03}Z"
        seconds = round((self.ended - self.began) / 1e9, 4)
        line = {"at": start, "id": self.id, "path": self.path, "status": self.status, "seconds": seconds, "first": self.first}
        return line | self.notes | ({} if self.text is None else {"text": self.text})


class RecordSink(Protocol):
    """Protocol of a sink that takes records without blocking."""

    def __call__(self, record: AccessRecord) -> None: ...


class AccessLogMiddleware:
    """ASGI middleware that passes a record of every POST request to a sink.

    Args:
        app: wrapped ASGI app.
        sink: receiver of the records.
        with_text: include the request body in the records.
    """

    def __init__(self, app: App, sink: RecordSink, *, with_text: bool = False) -> None:
        self._app = app
        self._sink = sink
        self._with_text = with_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and record it.

        The request id is the client's `x-request-id` if it is valid, else a new one; the response has it in the same header.
        """
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client_id = headers.get(REQUEST_ID, b"").decode("latin-1")
        request_id = client_id if FIT.fullmatch(client_id) else uuid.uuid4().hex
        scope = {**scope, "headers": set_header(scope["headers"], REQUEST_ID, request_id.encode()), NOTES: {}}
        began, clock = time.time_ns(), time.perf_counter()
        status, first, body = 0, None, b""

        async def receive_and_record() -> Message:
            nonlocal body
            message = await receive()
            if self._with_text and message["type"] == "http.request" and len(body) < MOST_TEXT:
                body += message.get("body", b"")
            return message

        async def send_and_record(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = set_header(message["headers"], REQUEST_ID, request_id.encode())
            elif first is None and message.get("body"):
                first = round(time.perf_counter() - clock, 4)
            await send(message)

        try:
            await self._app(scope, receive_and_record, send_and_record)
        finally:
            text = body[:MOST_TEXT].decode(errors="replace") if self._with_text else None
            notes = {key: value for key, value in scope[NOTES].items() if value is not None}
            parent = headers.get(b"traceparent", b"").decode("latin-1") or None
            self._sink(AccessRecord(request_id, scope["path"], status, began, time.time_ns(), first, notes, text, parent))


def format_record(record: AccessRecord) -> str:
    """Return a record as a line of JSON."""
    return json.dumps(record.as_json(), ensure_ascii=False)

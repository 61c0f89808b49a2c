"""Access-log middleware.

The outermost middleware passes a record of every POST request to a sink. Records contain the request text only if this is
enabled.
"""

import json
import re
import time
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from trimtab.engine.asgi import App, Message, Receive, Scope, Send, set_header
from trimtab.engine.request_context import RECORDED_BYTES, RequestContext

REQUEST_ID, SERVER_ID = b"x-request-id", b"x-trimtab-request-id"
FIT = re.compile(r"[\w.:-]{1,64}")
# Maximum length of the recorded path, in characters.
MAX_PATH = 200


@dataclass(frozen=True)
class AccessRecord:
    """Record of a request that has ended.

    Attributes:
        id: request id, which the client can choose.
        server_id: request id of the server, which is unique.
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
    server_id: str
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
        line = {"at": start, "id": self.id, "server_id": self.server_id, "path": self.path, "status": self.status}
        line |= {"seconds": seconds, "first": self.first}
        return line | self.notes | ({} if self.text is None else {"text": self.text})


class RecordSink(Protocol):
    """Protocol of a sink that takes records without blocking."""

    def __call__(self, record: AccessRecord) -> None: ...


class AccessLogMiddleware:
    """ASGI middleware that passes a record of every POST request to a sink, except of those without a valid API key.

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

        The request id is the client's `x-request-id` if it is valid, else that of the server. The response has both as headers.
        """
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client_id = headers.get(REQUEST_ID, b"").decode("latin-1")
        server_id = uuid.uuid4().hex
        context = RequestContext.get(scope, receive, send)
        context.server_id = server_id
        request_id = client_id if FIT.fullmatch(client_id) else server_id

        async def add_request_id(message: Message) -> None:
            headers = set_header(message["headers"], REQUEST_ID, request_id.encode())
            # It may have been signed since.
            message["headers"] = set_header(headers, SERVER_ID, context.server_id.encode())

        context.on_start(add_request_id)
        scope = {**scope, "headers": set_header(scope["headers"], REQUEST_ID, request_id.encode())}
        began = time.time_ns()
        try:
            await self._app(scope, receive, send)
        finally:
            # Strangers must not be able to fill the log.
            if context.status != HTTPStatus.UNAUTHORIZED:
                self._sink(self._build_record((request_id, context.server_id), scope, context, headers, began))

    def _build_record(
        self, ids: tuple[str, str], scope: Scope, context: RequestContext, headers: dict[bytes, bytes], began: int
    ) -> AccessRecord:
        text = context.body[:RECORDED_BYTES].decode(errors="replace") if self._with_text else None
        notes = {key: value for key, value in context.notes.items() if value is not None}
        parent = headers.get(b"traceparent", b"").decode("latin-1") or None
        path, first, ended = scope["path"][:MAX_PATH], context.first_byte_seconds, time.time_ns()
        return AccessRecord(*ids, path, context.status, began, ended, first, notes, text, parent)


def format_record(record: AccessRecord) -> str:
    """Return a record as a line of JSON."""
    return json.dumps(record.as_json(), ensure_ascii=False)

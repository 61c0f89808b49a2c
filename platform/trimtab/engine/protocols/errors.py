"""Error responses in the format of the protocol of a path."""

from http import HTTPStatus
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.asgi import Headers, Send
from trimtab.errors import TrimtabError

MESSAGES_PATH = "/v1/messages"
RESPONSES_PATH = "/v1/responses"
OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
# https://docs.anthropic.com/en/api/errors
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_messages_path(path: str) -> bool:
    """Return whether a path belongs to Anthropic's protocol."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def build_error_body(path: str, status: int, message: str) -> dict[str, Any]:
    """Return the body of an error response.

    Args:
        path: path of the request, which selects the protocol; unknown paths get OpenAI's format.
        status: HTTP status.
        message: reason for the error.
    """
    if is_messages_path(path):
        return {"type": "error", "error": {"type": ANTHROPIC_TYPES.get(status, "api_error"), "message": message}}
    error_type = OPENAI_TYPES.get(status, "InternalServerError")
    return {"error": {"message": message, "type": error_type, "param": None, "code": status}}


def build_error_event(path: str, status: int, message: str) -> bytes:
    """Return a server-sent event that ends a stream with an error.

    Args:
        path: path of the request, which selects the protocol.
        status: HTTP status that a complete response would have.
        message: reason for the error.
    """
    body = build_error_body(path, status, message)
    if is_messages_path(path):
        return b"event: error\ndata: " + asgi.dump_json(body) + b"\n\n"
    if path.rstrip("/") == RESPONSES_PATH:
        code = OPENAI_TYPES.get(status, "InternalServerError")
        event = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + asgi.dump_json(event) + b"\n\n"
    return b"data: " + asgi.dump_json(body) + b"\n\n"


async def send_error(send: Send, path: str, error: TrimtabError) -> None:
    """Send a TrimtabError in the format of the path's protocol, with `retry-after` if its status is 503."""
    retry = [(b"retry-after", b"1")] if error.http_status == HTTPStatus.SERVICE_UNAVAILABLE else []
    await send_failure(send, path, error.http_status, str(error), retry)


async def send_failure(send: Send, path: str, status: int, message: str, headers: Headers | None = None) -> None:
    """Send an error response in the format of the path's protocol.

    Args:
        send: `send` of the client.
        path: path of the request.
        status: HTTP status.
        message: reason for the error.
        headers: further headers.
    """
    await asgi.send_json(send, status, build_error_body(path, status, message), headers)

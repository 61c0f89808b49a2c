"""Anthropic's messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.protocols.errors import MESSAGES_PATH, build_error_body
from trimtab.engine.protocols.protocol import (
    Annotation,
    Event,
    JsonObject,
    Protocol,
    add_running_risk,
    parse_event,
)

FIRST_EVENT = b"event: message_start\n"
# The stream helper of Anthropic's client passes extra fields of `message_delta` on, and drops those of `message_stop`.
LAST_EVENTS = (b"event: message_delta\n", b"event: message_stop\n")
TEXT_EVENT = b"event: content_block_delta\n"
ERROR_EVENT = b"event: error\n"
SERVER_ERROR = 500
REFUSED: JsonObject = {"stop_reason": "refusal", "stop_sequence": None}


class MessagesProtocol(Protocol):
    """Protocol of `/v1/messages`: one answer as a list of content blocks."""

    def prepare_request(self, request: JsonObject) -> JsonObject:
        """Return the request unchanged."""
        return request

    def get_user(self, request: Mapping[str, Any]) -> str | None:
        """Return `metadata.user_id`."""
        metadata = request.get("metadata")
        user = metadata.get("user_id") if isinstance(metadata, dict) else None
        return user if isinstance(user, str) else None

    def rewrite_response(self, body: JsonObject, annotation: Annotation) -> JsonObject:
        """Add the `trimtab` field, and the stop reason `refusal` if a policy stopped the answer."""
        return super().rewrite_response(body, annotation) | (REFUSED if 0 in annotation.stopped else {})

    def rewrite_event(self, event: bytes, annotation: Annotation) -> bytes:
        """Rewrite the first and the last events. Text deltas get the risk if the request wants running risks."""
        if event.startswith(FIRST_EVENT) and (parsed := parse_event(event)):
            message = parsed.data["message"] | {"model": annotation.model}
            return Event(parsed.name, parsed.data | {"message": message}).encode()
        if event.startswith(LAST_EVENTS) and (parsed := parse_event(event)):
            if parsed.name == "message_delta" and 0 in annotation.refusals:
                return _refuse_stream(parsed, annotation)
            if parsed.name == "message_delta" and 0 in annotation.stopped:
                parsed.data["delta"] |= REFUSED
            return Event(parsed.name, parsed.data | {"trimtab": annotation.build_field()}).encode()
        if event.startswith(ERROR_EVENT) and (parsed := parse_event(event)):
            return Event(parsed.name, build_error_body(MESSAGES_PATH, SERVER_ERROR, parsed.data["error"]["message"])).encode()
        if annotation.risk.running and event.startswith(TEXT_EVENT) and (parsed := parse_event(event)):
            return add_running_risk(parsed, annotation)
        return event

    def rewrite_error(self, status: int, body: bytes) -> bytes:
        """Return an error of vLLM, which is in OpenAI's format or has OpenAI's types, in Anthropic's format."""
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return body
        return asgi.dump_json(build_error_body(MESSAGES_PATH, status, message))

    def withhold_answers(self, body: JsonObject, texts: Mapping[int, str]) -> None:
        """Replace the answer by its text, with stop reason `refusal`."""
        body["trimtab"].setdefault("withheld", False)
        if 0 in texts:
            body["trimtab"]["withheld"] = True
            body["content"] = [{"type": "text", "text": texts[0]}]
            body |= REFUSED

    def build_stream(self, body: JsonObject, *, usage: bool) -> bytes:
        """Return the events of a complete response; its first and last ones contain the usage."""
        message = {key: value for key, value in body.items() if key != "trimtab"}
        started = message | {"content": [], "stop_reason": None, "stop_sequence": None}
        started["usage"] = body["usage"] | {"output_tokens": 0}
        events: list[JsonObject] = [{"type": "message_start", "message": started}]
        for index, block in enumerate(body["content"]):
            events += _list_block_events(block, index)
        reason = {"stop_reason": body.get("stop_reason"), "stop_sequence": body.get("stop_sequence")}
        events.append({"type": "message_delta", "delta": reason, "usage": body["usage"], "trimtab": body["trimtab"]})
        events.append({"type": "message_stop", "trimtab": body["trimtab"]})
        return _encode_events(events)


class CountTokensProtocol(MessagesProtocol):
    """Protocol of `/v1/messages/count_tokens`: a conversation, and its number of tokens."""

    def rewrite_response(self, body: JsonObject, annotation: Annotation) -> JsonObject:
        """Return the response unchanged: it names no model."""
        return body


def _refuse_stream(last: Event, annotation: Annotation) -> bytes:
    """Return the events of a refusal before the end of a stream that has no content."""
    delta = last.data["delta"] | REFUSED
    end = last.data | {"delta": delta, "trimtab": annotation.build_field() | {"withheld": True}}
    return _encode_events([*_list_block_events({"type": "text", "text": annotation.refusals[0]}, 0), end]).removesuffix(b"\n\n")


def _encode_events(events: Sequence[JsonObject]) -> bytes:
    return b"".join(Event(event["type"], event).encode() + b"\n\n" for event in events)


def _list_block_events(block: JsonObject, index: int) -> list[JsonObject]:
    """Return the events of a content block."""
    empty, deltas = _split_block(block)
    return [
        {"type": "content_block_start", "index": index, "content_block": empty},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def _split_block(block: JsonObject) -> tuple[JsonObject, list[JsonObject]]:
    """Split a content block into its start and its deltas."""
    if block["type"] == "tool_use":
        return block | {"input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    if block["type"] == "thinking":
        deltas: list[JsonObject] = [{"type": "thinking_delta", "thinking": block["thinking"]}]
        if block.get("signature"):
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        return {"type": "thinking", "thinking": "", "signature": ""}, deltas
    return block | {"text": ""}, [{"type": "text_delta", "text": block["text"]}]

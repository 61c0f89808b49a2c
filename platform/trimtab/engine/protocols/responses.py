"""OpenAI's responses, without stored state."""

from collections.abc import Mapping
from typing import Any

from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.protocols.protocol import (
    Annotation,
    Event,
    JsonObject,
    Protocol,
    add_running_risk,
    is_risky,
    parse_event,
)
from trimtab.errors import UsageError

# Fields that refer to state on the server, and what to do instead.
STATEFUL_FIELDS = {
    "background": "Send the request without background",
    "previous_response_id": "Send the whole conversation in input",
    "conversation": "Send the whole conversation in input",
    "prompt": "Send the text in instructions and input",
}
FIRST_EVENTS = (b"event: response.created\n", b"event: response.in_progress\n")
LAST_EVENTS = (b"event: response.completed\n", b"event: response.incomplete\n", b"event: response.failed\n")
TEXT_EVENT = b"event: response.output_text.delta\n"


class ResponsesProtocol(Protocol):
    """Protocol of `/v1/responses`: one answer as a list of output items."""

    def prepare_request(self, request: JsonObject) -> JsonObject:
        """Switch storing off, as the server stores nothing, and reject fields that need stored state."""
        for name, advice in STATEFUL_FIELDS.items():
            if request.get(name):
                raise UsageError(f"{name} is not supported: this server stores no responses. {advice}")
        if request.get("enable_response_messages"):
            raise UsageError("enable_response_messages is not supported: it returns the rendered prompt. Send false")
        return request | {"store": False}

    def get_user(self, request: Mapping[str, Any]) -> str | None:
        """Return `user`, or its successors `safety_identifier` and `prompt_cache_key`."""
        users = (request.get(name) for name in ("user", "safety_identifier", "prompt_cache_key"))
        return next((user for user in users if isinstance(user, str)), None)

    def rewrite_event(self, event: bytes, annotation: Annotation) -> bytes:
        """Rewrite the events that contain the response. Deltas of the text get the risk if the request wants running risks."""
        ends = event.startswith(LAST_EVENTS)
        scored = annotation.risk.running and event.startswith(TEXT_EVENT)
        if not (ends or scored or event.startswith(FIRST_EVENTS)) or (parsed := parse_event(event)) is None:
            return event
        if scored:
            return add_running_risk(parsed, annotation)
        response = parsed.data["response"]
        response = self.rewrite_response(response, annotation) if ends else response | {"model": annotation.model}
        return Event(parsed.name, parsed.data | {"response": response}).encode()

    def withhold_answers(self, body: JsonObject, options: RequestOptions, risk: RequestRisk) -> None:
        """Replace a risky answer by the refusal text; the response is incomplete because of `content_filter`."""
        withheld = is_risky(risk, 0, options)
        body["trimtab"]["withheld"] = withheld
        if withheld:
            text = {"type": "output_text", "text": options.refusal_text, "annotations": [], "logprobs": None}
            item_id = "msg_" + body["id"].removeprefix("resp_")
            item = {"id": item_id, "type": "message", "role": "assistant", "status": "incomplete", "content": [text]}
            body |= {"output": [item], "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}

    def build_stream(self, body: JsonObject, *, usage: bool) -> bytes:
        """Return the events of a complete response; the last one contains the usage."""
        started = {key: value for key, value in body.items() if key != "trimtab"}
        started |= {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        events: list[JsonObject] = [
            {"type": "response.created", "response": started},
            {"type": "response.in_progress", "response": started},
        ]
        for number, item in enumerate(body["output"]):
            events += _list_item_events(item, number)
        end = "incomplete" if body["status"] == "incomplete" else "completed"
        events.append({"type": f"response.{end}", "response": body})
        return b"".join(
            Event(event["type"], event | {"sequence_number": number}).encode() + b"\n\n" for number, event in enumerate(events)
        )


def _list_item_events(item: JsonObject, number: int) -> list[JsonObject]:
    """Return the events of an output item: its start, its parts or arguments, and its end."""
    place = {"item_id": item["id"], "output_index": number}
    begun = item | {"status": "in_progress"} | ({"content": []} if item.get("content") else {})
    events: list[JsonObject] = [{"type": "response.output_item.added", "output_index": number, "item": begun}]
    if item["type"] == "function_call":
        events.append({"type": "response.function_call_arguments.delta", "delta": item["arguments"]} | place)
        done = {"type": "response.function_call_arguments.done", "arguments": item["arguments"], "name": item["name"]}
        events.append(done | place)
    for index, part in enumerate(item.get("content") or []):
        if part["type"] != "output_text":
            continue
        place |= {"content_index": index}
        text = {"logprobs": part.get("logprobs") or []}
        events += [
            {"type": "response.content_part.added", "part": part | {"text": ""}} | place,
            {"type": "response.output_text.delta", "delta": part["text"]} | text | place,
            {"type": "response.output_text.done", "text": part["text"]} | text | place,
            {"type": "response.content_part.done", "part": part} | place,
        ]
    return [*events, {"type": "response.output_item.done", "output_index": number, "item": item}]

"""OpenAI's responses, without stored state."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.engine.protocols.protocol import (
    Annotation,
    Event,
    JsonObject,
    Protocol,
    add_running_risk,
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
INCOMPLETE = "response.incomplete"
FILTERED: JsonObject = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}
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

    def rewrite_response(self, body: JsonObject, annotation: Annotation) -> JsonObject:
        """Add the `trimtab` field, and mark the response as incomplete if a policy stopped the answer."""
        return super().rewrite_response(body, annotation) | (FILTERED if 0 in annotation.stopped else {})

    def rewrite_event(self, event: bytes, annotation: Annotation) -> bytes:
        """Rewrite the events that contain the response. Deltas of the text get the risk if the request wants running risks."""
        ends = event.startswith(LAST_EVENTS)
        scored = annotation.risk.running and event.startswith(TEXT_EVENT)
        if not (ends or scored or event.startswith(FIRST_EVENTS)) or (parsed := parse_event(event)) is None:
            return event
        if scored:
            return add_running_risk(parsed, annotation)
        response = parsed.data["response"]
        if ends and 0 in annotation.refusals:
            return self._refuse_stream(parsed, annotation)
        response = self.rewrite_response(response, annotation) if ends else response | {"model": annotation.model}
        kind = {"type": INCOMPLETE} if ends and 0 in annotation.stopped else {}
        return Event(kind.get("type", parsed.name), parsed.data | {"response": response} | kind).encode()

    def withhold_answers(self, body: JsonObject, texts: Mapping[int, str]) -> None:
        """Replace the answer by its text; the response is incomplete because of `content_filter`."""
        body["trimtab"].setdefault("withheld", False)
        if 0 in texts:
            body["trimtab"]["withheld"] = True
            text = {"type": "output_text", "text": texts[0], "annotations": [], "logprobs": None}
            item_id = "msg_" + body["id"].removeprefix("resp_")
            item = {"id": item_id, "type": "message", "role": "assistant", "status": "incomplete", "content": [text]}
            body |= {"output": [item]} | FILTERED

    def build_stream(self, body: JsonObject, *, usage: bool) -> bytes:
        """Return the events of a complete response; the last one contains the usage."""
        started = {key: value for key, value in body.items() if key != "trimtab"}
        started |= {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        events: list[JsonObject] = [
            {"type": "response.created", "response": started},
            {"type": "response.in_progress", "response": started},
        ]
        return _encode_events([*events, *_list_output_events(body)], 0)

    def _refuse_stream(self, last: Event, annotation: Annotation) -> bytes:
        """Return the events of a refusal, instead of the last event of a stream that has no output."""
        body = self.rewrite_response(last.data["response"], annotation)
        self.withhold_answers(body, annotation.refusals)
        return _encode_events(_list_output_events(body), last.data["sequence_number"]).removesuffix(b"\n\n")


def _encode_events(events: Sequence[JsonObject], first: int) -> bytes:
    """Encode events with sequence numbers from `first` up."""
    numbered = (Event(event["type"], event | {"sequence_number": number}) for number, event in enumerate(events, first))
    return b"".join(event.encode() + b"\n\n" for event in numbered)


def _list_output_events(body: JsonObject) -> list[JsonObject]:
    """Return the events of the output items of a response, and of its end."""
    end = "incomplete" if body["status"] == "incomplete" else "completed"
    items = [event for number, item in enumerate(body["output"]) for event in _list_item_events(item, number)]
    return [*items, {"type": f"response.{end}", "response": body}]


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

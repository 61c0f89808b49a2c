"""OpenAI's chat completions and completions."""

import json
from collections.abc import Mapping
from typing import Any

from trimtab.engine import asgi
from trimtab.engine.protocols.protocol import Annotation, JsonObject, Protocol
from trimtab.errors import UsageError

MAX_ANSWERS = 128


class CompletionsProtocol(Protocol):
    """Protocol of `/v1/completions`: a prompt, and choices."""

    has_messages = False

    def prepare_request(self, request: JsonObject) -> JsonObject:
        """Limit the answers of a request to the limit of OpenAI's API, since each occupies memory of the engine."""
        count = request.get("n")
        if isinstance(count, int | None) and (count or 1) * count_prompts(request) > MAX_ANSWERS:
            raise UsageError(f"a request may ask for at most {MAX_ANSWERS} answers: n times the number of prompts")
        return request

    def get_user(self, request: Mapping[str, Any]) -> str | None:
        """Return `user`."""
        user = request.get("user")
        return user if isinstance(user, str) else None

    def rewrite_response(self, body: JsonObject, annotation: Annotation) -> JsonObject:
        """Add the risk to each choice, and the `trimtab` field."""
        _annotate_choices(body["choices"], annotation)
        return super().rewrite_response(body, annotation)

    def rewrite_event(self, event: bytes, annotation: Annotation) -> bytes:
        """Rewrite a chunk.

        Only the chunks that end a choice, the usage chunk, and all chunks with running risks are parsed. Other chunks get their
        model name by replacement of bytes, to add no latency per token.
        """
        if not event.startswith(b"data: {"):
            return event
        ends = b'"finish_reason":"' in event or b'"choices":[]' in event
        if not ends and not annotation.risk.running:
            return event.replace(*annotation.model_bytes, 1)
        chunk = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            return event
        _annotate_choices(chunk["choices"], annotation)
        for choice in chunk["choices"]:
            # A refused choice has no other text: its request ended before the first token.
            if choice.get("finish_reason") and (text := annotation.refusals.get(choice["index"])) is not None:
                _withhold_choice(choice, text)
        field = {"trimtab": annotation.build_field()} if ends else {}
        return b"data: " + asgi.dump_json(chunk | {"model": annotation.model} | field)

    def withhold_answers(self, body: JsonObject, texts: Mapping[int, str]) -> None:
        """Replace choices by their texts, with finish reason `content_filter`."""
        for choice in body["choices"]:
            choice.setdefault("trimtab", {}).setdefault("withheld", False)
            if (text := texts.get(choice["index"])) is not None:
                _withhold_choice(choice, text)

    def build_stream(self, body: JsonObject, *, usage: bool) -> bytes:
        """Return two chunks per choice, its content and its end, and a usage chunk if requested."""
        common = {key: body[key] for key in ("id", "created", "model")}
        common["object"] = "chat.completion.chunk" if body["object"] == "chat.completion" else body["object"]
        chunks: list[JsonObject] = []
        for choice in body["choices"]:
            content = {"index": choice["index"], "logprobs": choice["logprobs"], "finish_reason": None}
            if "message" in choice:
                delta = {key: value for key, value in choice["message"].items() if value is not None and value != []}
                if "tool_calls" in delta:
                    delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
                content["delta"], end = delta, {"delta": {}}
            else:
                content["text"], end = choice["text"], {"text": ""}
            chunks.append({"choices": [content]})
            end |= {key: choice[key] for key in ("index", "finish_reason", "trimtab") if key in choice}
            chunks.append({"choices": [end | {"logprobs": None}], "trimtab": body["trimtab"]})
        if usage:
            chunks.append({"choices": [], "usage": body["usage"], "trimtab": body["trimtab"]})
        return b"".join(b"data: " + asgi.dump_json(common | chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


class ChatProtocol(CompletionsProtocol):
    """Protocol of `/v1/chat/completions`."""

    has_messages = True


def count_prompts(request: Mapping[str, Any]) -> int:
    """Return the number of prompts of a request. A list holds several prompts, or the token ids of one."""
    prompt = request.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _withhold_choice(choice: JsonObject, text: str) -> None:
    """Replace the content of a choice or of its last chunk, in place."""
    choice |= {"finish_reason": "content_filter", "logprobs": None}
    choice.setdefault("trimtab", {})["withheld"] = True
    if "message" in choice:
        choice["message"] = {"role": "assistant", "content": text}
    elif "delta" in choice:
        choice["delta"] = {"content": text}
    else:
        choice["text"] = text


def _annotate_choices(choices: list[JsonObject], annotation: Annotation) -> None:
    """Add the risk to choices or chunks, and the reason why a policy ended them."""
    for choice in choices:
        if described := annotation.risk.describe_choice(choice["index"]):
            choice["trimtab"] = described
        if choice.get("finish_reason") and choice["index"] in annotation.stopped:
            choice["finish_reason"] = "content_filter"

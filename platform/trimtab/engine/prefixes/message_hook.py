"""Message hook: insertion of a prefix into the messages of a request, directly before vLLM renders them.

The request itself stays as the client sent it, so that no field that vLLM echoes contains a slot token.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from vllm.exceptions import VLLMValidationError

from trimtab.engine.context import steering
from trimtab.engine.vllm_ext import patches
from trimtab.errors import UsageError
from trimtab.model.chat_template import ChatRenderer


def install_message_hook(engine: Any, renderer: ChatRenderer) -> None:
    """Install the hook in a `vllm.AsyncLLM`.

    Args:
        engine: the engine.
        renderer: chat renderer of the base model.
    """
    patches.patch_message_rendering(engine, partial(_insert_prefix, renderer), partial(_remove_prefix, renderer))


def _insert_prefix(renderer: ChatRenderer, messages: Sequence[Any]) -> Sequence[Any]:
    """Insert the slot tokens of the request's prefix. The token guard inserts a prefix at position `start`."""
    prefix = steering.get()
    if prefix is None or prefix.position == "start":
        return messages
    if not messages:
        raise VLLMValidationError("the conversation must contain at least one message")
    if not all(isinstance(message, dict) for message in messages):
        raise VLLMValidationError("a conversation with a prefix must consist of messages with role and content")
    try:
        return renderer.insert_slot_tokens(list(map(_read_parts, messages)), prefix.position, prefix.slots)
    except UsageError as error:
        raise VLLMValidationError(str(error)) from error


def _read_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content parts are a list; pydantic may pass an iterator."""
    content = message.get("content")
    return {**message, "content": list(content)} if isinstance(content, Iterator) else message


def _remove_prefix(renderer: ChatRenderer, messages: Sequence[Any]) -> Sequence[Any]:
    """Remove the slot tokens from rendered messages, which vLLM echoes on request."""
    prefix = steering.get()
    if prefix is None or prefix.position == "start":
        return messages
    text = renderer.slot_text(prefix.slots)
    return [_remove_text(message, text) for message in messages]


def _remove_text(message: Any, text: str) -> Any:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content.replace(text, "", 1)}
    if isinstance(content, list):
        parts = [{**p, "text": p["text"].replace(text, "", 1)} if isinstance(p.get("text"), str) else p for p in content]
        return {**message, "content": parts}
    return message

"""Scoring of supplied answers (`POST /v1/score`)."""

import asyncio
import json
import uuid
from typing import Any

from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

from trimtab.engine.context import Steering, join_salts, reads_supplied_answer
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START
from trimtab.errors import UsageError
from trimtab.model.chat_template import ChatRenderer

# Fields of a message that chat templates read.
TEMPLATE_FIELDS = ("role", "name", "tool_calls", "tool_call_id")


async def score_supplied_answer(
    engine: Any, renderer: ChatRenderer, request: dict[str, Any], steering: Steering | None, risk: RequestRisk
) -> int:
    """Compute the risk of a supplied answer, as if the engine had generated it.

    Args:
        engine: vLLM's engine, with the output hook installed.
        renderer: chat renderer of the base model.
        request: request body with `messages` and `answer`.
        steering: prefix of the request; None for the plain base model.
        risk: detector of the request; receives the risk.

    Returns:
        Number of tokens of conversation and answer.

    Raises:
        UsageError: if the request has no valid conversation and answer, or too many tokens.
    """
    limit = engine.model_config.max_model_len - 1
    _check_size(request, limit, engine.get_tokenizer().max_chars_per_token)
    prompt_ids, answer_ids = await asyncio.to_thread(_render, renderer, request, steering)
    ids = [*prompt_ids, *answer_ids]
    if len(ids) > limit:
        raise UsageError(f"messages and answer have {len(ids)} tokens; the engine takes {limit}")
    prompt = tokens_input(ids, cache_salt=join_salts())
    sampling = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, extra_args={SUPPLIED_ANSWER_START: len(prompt_ids)})
    # vLLM generates at least one token, which is not part of the answer.
    risk.supplied_tokens = len(answer_ids)
    token = reads_supplied_answer.set(True)
    try:
        async for _ in engine.generate(prompt, sampling, f"score-{uuid.uuid4().hex}"):
            pass
    finally:
        reads_supplied_answer.reset(token)
    return len(ids)


def _check_size(request: dict[str, Any], limit: int, longest: int) -> None:
    """Raise UsageError for a request that cannot fit, before anything is rendered.

    Args:
        request: request body.
        limit: maximum number of tokens.
        longest: number of characters of the longest token.
    """
    messages, answer = request.get("messages"), request.get("answer")
    # A message has at least one token, and a token at most `longest` characters.
    listed: list[Any] = messages if isinstance(messages, list) else []
    texts = [answer, *(m.get("content") for m in listed if isinstance(m, dict))]
    count, size = len(listed), sum(map(_count_characters, texts))
    if count > limit or size > limit * longest:
        raise UsageError(
            f"messages and answer are too long: {count} messages, {size} characters; the engine takes {limit} tokens"
        )


def _count_characters(content: Any) -> int:
    """Return the number of characters of a text, or of the text parts of a list."""
    if isinstance(content, list):
        return sum(_count_characters(part.get("text")) for part in content if isinstance(part, dict))
    return len(content) if isinstance(content, str) else 0


def _render(renderer: ChatRenderer, request: dict[str, Any], steering: Steering | None) -> tuple[list[int], list[int]]:
    """Return the token ids of conversation and answer."""
    messages, text = _parse_conversation(request)
    position, slots = (steering.position, steering.slots) if steering else ("system", ())
    prompt_ids = renderer.render_prompt(messages, position, slots)
    answer_ids = renderer.render_answer(text, prompt_ids)
    renderer.check_slots([*prompt_ids, *answer_ids], slots)
    return prompt_ids, answer_ids


def _parse_conversation(request: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    messages, answer = request.get("messages"), request.get("answer")
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages must be a list of at least one message")
    if not isinstance(answer, str):
        raise UsageError("answer must be the text of the answer to messages")
    return [_parse_message(message) for message in messages], answer


def _parse_message(message: Any) -> dict[str, Any]:
    """Return a message as vLLM passes it to chat templates: with its text in one string, and tool arguments as objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError("each message must be an object with a role")
    parsed = {key: value for key, value in message.items() if key in TEMPLATE_FIELDS and value is not None}
    parsed["content"] = _join_parts(message.get("content"))
    if "tool_calls" in parsed:
        parsed["tool_calls"] = _parse_tool_calls(parsed["tool_calls"])
    elif message.get("content") is None:
        raise UsageError("each message must have a content, or tool_calls")
    return parsed


def _join_parts(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UsageError("content must be text, or a list of parts of type text: only text can be scored")
    return "\n".join(part["text"] for part in parts)


def _parse_tool_calls(calls: Any) -> list[dict[str, Any]]:
    try:
        return [
            call | {"function": call["function"] | {"arguments": _parse_arguments(call["function"].get("arguments"))}}
            for call in calls
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UsageError("tool_calls must be a list of calls, each with a function and its arguments as JSON") from error


def _parse_arguments(arguments: Any) -> Any:
    return json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments

"""Scoring of given answers (`POST /v1/score`)."""

import uuid
from typing import Any

from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

from trimtab.engine.context import Steering, reads_given_answer
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.vllm_ext.args import GIVEN_ANSWER_START
from trimtab.errors import UsageError
from trimtab.model.chat_template import ChatRenderer


async def score_given_answer(
    engine: Any, renderer: ChatRenderer, request: dict[str, Any], steering: Steering | None, risk: RequestRisk
) -> int:
    """Compute the risk of a given answer, as if the engine had generated it.

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
    messages, text = _parse_conversation(request)
    position, slots = (steering.position, steering.slots) if steering else ("system", ())
    prompt_ids = renderer.render_prompt(messages, position, slots)
    answer_ids = renderer.render_answer(text, prompt_ids)
    ids = [*prompt_ids, *answer_ids]
    renderer.check_slots(ids, slots)
    if len(ids) > (limit := engine.model_config.max_model_len - 1):
        raise UsageError(f"messages and answer have {len(ids)} tokens; the engine takes {limit}")
    prompt = tokens_input(ids, cache_salt=steering.salt if steering else None)
    sampling = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, extra_args={GIVEN_ANSWER_START: len(prompt_ids)})
    # vLLM generates at least one token, which is not part of the answer.
    risk.given_tokens = len(answer_ids)
    token = reads_given_answer.set(True)
    try:
        async for _ in engine.generate(prompt, sampling, f"score-{uuid.uuid4().hex}"):
            pass
    finally:
        reads_given_answer.reset(token)
    return len(ids)


def _parse_conversation(request: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    messages, answer = request.get("messages"), request.get("answer")
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError("each message must have a role and a content that are strings")
    if not isinstance(answer, str):
        raise UsageError("answer must be the text of the answer to messages")
    return [{"role": m["role"], "content": m["content"]} for m in messages], answer

"""`POST /v1/score`: the risk of an answer that someone else wrote, read by the engine as if it had written it."""

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
    engine: Any, renderer: ChatRenderer, request: dict[str, Any], now: Steering | None, watch: RequestRisk
) -> int:
    """Read the answer under the prefix `now`; its risk is `watch`'s then. Gives the number of tokens read.

    Raises UsageError for a request that holds no conversation and answer, or more than the engine takes.
    """
    messages, text = _parse_conversation(request)
    place, rows = (now.place, now.rows) if now else ("system", ())
    before = renderer.render_prompt(messages, place, rows)
    written = renderer.render_answer(text, before)
    ids = [*before, *written]
    renderer.check_rows(ids, rows)
    if len(ids) > (most := engine.model_config.max_model_len - 1):
        raise UsageError(f"messages and answer have {len(ids)} tokens; the engine takes {most}")
    prompt = tokens_input(ids, cache_salt=now.salt if now else None)
    sampling = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True, extra_args={GIVEN_ANSWER_START: len(before)})
    # The one token that vLLM writes at least is none of the answer's.
    watch.given = len(written)
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
            raise UsageError("each of messages must have a role and a content that is text")
    if not isinstance(answer, str):
        raise UsageError("answer must be the text of the answer to messages")
    return [{"role": m["role"], "content": m["content"]} for m in messages], answer

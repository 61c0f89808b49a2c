"""Token guard: check of the reserved token ids in every prompt.

The guard checks the token ids of the prompts of all endpoints directly before the engine. A request with a prefix must contain
exactly the slot tokens of that prefix. A request without a prefix must contain none. Thus neither text nor a list of token ids
can address the slots of another prefix.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from vllm.exceptions import VLLMValidationError

from trimtab.engine.context import join_salts, reads_supplied_answer, steering
from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import SUPPLIED_ANSWER_START
from trimtab.model.chat_template import ChatRenderer


def check_token_ids(ids: Sequence[int], first_slot: int, slots: Sequence[int]) -> None:
    """Check the reserved token ids of a prompt.

    Args:
        ids: token ids of the prompt.
        first_slot: first reserved token id.
        slots: reserved token ids that the prompt must contain, in order.

    Raises:
        VLLMValidationError: if the ids from `first_slot` up differ from `slots`. vLLM returns it as HTTP 400.
    """
    reserved = [i for i in ids if i >= first_slot]
    if reserved != list(slots):
        raise VLLMValidationError("the prompt contains reserved token ids. Select a prefix with `model` instead")


def install_token_guard(engine: Any, renderer: ChatRenderer) -> None:
    """Install the guard in a `vllm.AsyncLLM`: at prompt rendering and at `add_request`.

    Args:
        engine: the engine.
        renderer: chat renderer of the base model; defines the reserved token ids.
    """

    def wrap(add_request: Callable[..., Any]) -> Callable[..., Any]:
        async def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            # Some endpoints pass token ids without rendering. All of them call add_request.
            prefix = steering.get()
            check_token_ids(get_token_ids(prompt), renderer.first_slot, prefix.slots if prefix else ())
            _check_extra_args(params)
            added = await add_request(request_id, prompt, params, *args, **kwargs)
            if prefix and prefix.written:
                await _wait_until_written(prefix.written, partial(engine.abort, request_id))
            return added

        return add

    patches.patch_prompt_rendering(engine, partial(_admit_prompt, renderer=renderer))
    patches.patch_add_request(engine, "token_guard", wrap)


async def _wait_until_written(written: asyncio.Future[None], abort: Callable[[], Awaitable[None]]) -> None:
    """Wait until a prefix's vectors are written; abort the request if that fails.

    Waiting after `add_request` is safe: the engine receives the write first, and processes both in order between two steps.
    """
    try:
        await asyncio.shield(written)
    except BaseException:
        await abort()
        raise


def _check_extra_args(params: Any) -> None:
    """Reject the start of a supplied answer in requests that score none, since clients can send any extra argument."""
    if SUPPLIED_ANSWER_START in (getattr(params, "extra_args", None) or {}) and not reads_supplied_answer.get():
        raise VLLMValidationError(
            f"{SUPPLIED_ANSWER_START} is not a request argument. Use /v1/score to score a supplied answer"
        )


def _admit_prompt(prompt: Any, renderer: ChatRenderer) -> Any:
    """Check a rendered prompt; insert a prefix at position `start`; add the salts of prefix and tenant."""
    prefix = steering.get()
    ids = get_token_ids(prompt)
    if salt := join_salts(prompt.get("cache_salt")):
        prompt["cache_salt"] = salt
    if prefix is None:
        check_token_ids(ids, renderer.first_slot, ())
        return prompt
    if prefix.position == "start":
        check_token_ids(ids, renderer.first_slot, ())
        prompt["prompt_token_ids"] = renderer.insert_slots_at_start(ids, prefix.slots)
        # The offsets refer to the ids before the insertion.
        prompt.pop("prompt_token_offsets", None)
    else:
        check_token_ids(ids, renderer.first_slot, prefix.slots)
    return prompt


def get_token_ids(prompt: Any) -> Sequence[int]:
    """Return the token ids of a prompt. Raise VLLMValidationError if it has none."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    if ids is None:
        raise VLLMValidationError("prompt embeddings are not supported. Send text, messages or token ids")
    return ids

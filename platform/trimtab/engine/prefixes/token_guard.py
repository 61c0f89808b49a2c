"""The last gate before the engine: every prompt, whatever endpoint and form it came by, is looked at as token ids.

A request that was given a prefix must hold exactly that prefix's row tokens; any other must hold none. So no text, and no
list of token ids, reaches another user's rows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from vllm.exceptions import VLLMValidationError

from trimtab.engine.context import reads_given_answer, steering
from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import GIVEN_ANSWER_START
from trimtab.model.chat_template import ChatRenderer


def check_token_ids(ids: Sequence[int], first_row: int, rows: Sequence[int]) -> None:
    """VLLMValidationError (HTTP 400) unless the ids from `first_row` up are exactly `rows`."""
    reserved = [i for i in ids if i >= first_row]
    if reserved != list(rows):
        raise VLLMValidationError("the prompt holds reserved token ids; they belong to prefixes, which are chosen by `model`")


def install_token_guard(engine: Any, renderer: ChatRenderer) -> None:
    """Guard a `vllm.AsyncLLM`: check prompts where they become engine inputs, and again where requests are added."""

    def wrap(add_request: Callable[..., Any]) -> Callable[..., Any]:
        async def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            # Some endpoints hand over token ids without rendering; here they all pass.
            now = steering.get()
            check_token_ids(_get_token_ids(prompt), renderer.first_row, now.rows if now else ())
            _check_extra_args(params)
            added = await add_request(request_id, prompt, params, *args, **kwargs)
            if now and now.written:
                await _wait_until_written(now.written, partial(engine.abort, request_id))
            return added

        return add

    patches.patch_prompt_rendering(engine, partial(_admit_prompt, renderer=renderer))
    patches.patch_add_request(engine, "token_guard", wrap)


async def _wait_until_written(written: asyncio.Future[None], abort: Callable[[], Awaitable[None]]) -> None:
    """Wait for a prefix's vectors once the request is sent after them: the engine takes both in order, between two steps."""
    try:
        await asyncio.shield(written)
    except BaseException:
        await abort()
        raise


def _check_extra_args(params: Any) -> None:
    """Only a request to score may say where in its prompt an answer begins: clients can name any argument of the engine's."""
    if GIVEN_ANSWER_START in (getattr(params, "extra_args", None) or {}) and not reads_given_answer.get():
        raise VLLMValidationError(f"{GIVEN_ANSWER_START} is no argument of a request; /v1/score reads answers that are given")


def _admit_prompt(prompt: Any, renderer: ChatRenderer) -> Any:
    """Check a rendered prompt; put a prefix of place `start` in, and its salt on the prompt's KV cache."""
    now = steering.get()
    ids = _get_token_ids(prompt)
    if now is None:
        check_token_ids(ids, renderer.first_row, ())
        return prompt
    if now.place == "start":
        check_token_ids(ids, renderer.first_row, ())
        prompt["prompt_token_ids"] = renderer.insert_rows_at_start(ids, now.rows)
        # Offsets belong to the ids as they were.
        prompt.pop("prompt_token_offsets", None)
    else:
        check_token_ids(ids, renderer.first_row, now.rows)
    prompt["cache_salt"] = ":".join(filter(None, (now.salt, prompt.get("cache_salt"))))
    return prompt


def _get_token_ids(prompt: Any) -> Sequence[int]:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    if ids is None:
        raise VLLMValidationError("this server takes text, messages or token ids, no embeddings")
    return ids

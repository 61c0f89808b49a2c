"""The last gate before the engine: every prompt, whatever endpoint and form it came by, is looked at as token ids.

A request that was given a prefix must hold exactly that prefix's row tokens; any other must hold none. So no text, and no
list of token ids, reaches another user's rows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm.exceptions import VLLMValidationError

from trimtab.engine.detectors.request_risk import watching
from trimtab.engine.vllm_ext.capture import GIVEN
from trimtab.model.chat_template import Renderer
from trimtab.types import Place


@dataclass(frozen=True)
class Steering:
    """A prefix as it is in the engine for one request: its rows and the salt of its KV cache."""

    name: str
    version: int
    run_id: str | None
    place: Place
    rows: tuple[int, ...]
    salt: str
    written: asyncio.Future[None] | None = None
    """Where the vectors are only on their way to the rows: done when they are there."""


steering: ContextVar[Steering | None] = ContextVar("steering", default=None)
"""The prefix of the HTTP request that this task answers."""


def check(ids: Sequence[int], first_row: int, rows: Sequence[int]) -> None:
    """VLLMValidationError (HTTP 400) unless the ids from `first_row` up are exactly `rows`."""
    reserved = [i for i in ids if i >= first_row]
    if reserved != list(rows):
        raise VLLMValidationError("the prompt holds reserved token ids; they belong to prefixes, which are chosen by `model`")


def install(engine: Any, renderer: Renderer) -> None:
    """Put the gate into a `vllm.AsyncLLM`: where prompts become engine inputs, and where requests are added."""
    gate = engine.renderer
    render, render_async, add_request = gate.process_for_engine, gate.process_for_engine_async, engine.add_request

    def process(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return render(_admit(prompt, renderer), *args, **kwargs)

    async def process_async(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return await render_async(_admit(prompt, renderer), *args, **kwargs)

    async def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # Some endpoints hand over token ids without rendering; here they all pass.
        now = steering.get()
        check(_ids(prompt), renderer.first_row, now.rows if now else ())
        _check_given(params)
        added = await add_request(request_id, prompt, params, *args, **kwargs)
        if now and now.written:
            await _await(now.written, partial(engine.abort, request_id))
        return added

    gate.process_for_engine, gate.process_for_engine_async, engine.add_request = process, process_async, add


async def _await(written: asyncio.Future[None], abort: Callable[[], Awaitable[None]]) -> None:
    """Wait for a prefix's vectors once the request is sent after them: the engine takes both in order, between two steps."""
    try:
        await asyncio.shield(written)
    except BaseException:
        await abort()
        raise


def _check_given(params: Any) -> None:
    """Only a request to score may say where in its prompt an answer begins: clients can name any argument of the engine's."""
    watch = watching.get()
    if GIVEN in (getattr(params, "extra_args", None) or {}) and not (watch and watch.given):
        raise VLLMValidationError(f"{GIVEN} is no argument of a request; /v1/score reads answers that are given")


def _admit(prompt: Any, renderer: Renderer) -> Any:
    """Check a rendered prompt; put a prefix of place `start` in, and its salt on the prompt's KV cache."""
    now = steering.get()
    ids = _ids(prompt)
    if now is None:
        check(ids, renderer.first_row, ())
        return prompt
    if now.place == "start":
        check(ids, renderer.first_row, ())
        prompt["prompt_token_ids"] = renderer.at_start(ids, now.rows)
        # Offsets belong to the ids as they were.
        prompt.pop("prompt_token_offsets", None)
    else:
        check(ids, renderer.first_row, now.rows)
    prompt["cache_salt"] = ":".join(filter(None, (now.salt, prompt.get("cache_salt"))))
    return prompt


def _ids(prompt: Any) -> Sequence[int]:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    if ids is None:
        raise VLLMValidationError("this server takes text, messages or token ids, no embeddings")
    return ids

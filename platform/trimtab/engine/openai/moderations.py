"""Moderation of texts by detectors of prompts (`POST /v1/moderations`), in OpenAI's format."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

from trimtab.engine.context import join_salts
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.detectors.request_risk import RequestRisk, current_risk
from trimtab.errors import BusyError, UsageError
from trimtab.model.chat_template import ChatRenderer

MODERATIONS_PATH = "/v1/moderations"
# Fields of a request that trimtab reads.
MODERATION_FIELDS = frozenset({"model", "input"})
MAX_INPUTS = 128


async def moderate_inputs(engine: Any, renderer: ChatRenderer, request: Mapping[str, Any], verdicts: PromptVerdicts) -> int:
    """Compute the risks of texts, each as the message of a user to the plain base model.

    Args:
        engine: vLLM's engine, with the output hook installed.
        renderer: chat renderer of the base model.
        request: request body with `input`.
        verdicts: policies that name the detectors; receives the risks of the texts by their index.

    Returns:
        Number of tokens of all texts.

    Raises:
        UsageError: if `input` is invalid, or a text is too long.
        BusyError: if the engine could not score a text.
    """
    texts = _parse_inputs(request.get("input"))
    limit = engine.model_config.max_model_len - 1
    longest = engine.get_tokenizer().max_chars_per_token
    if long := [number for number, text in enumerate(texts) if len(text) > limit * longest]:
        raise UsageError(f"input {long[0]} has {len(texts[long[0]])} characters; the engine takes {limit} tokens")
    prompts = await asyncio.to_thread(lambda: [renderer.render_prompt([{"role": "user", "content": text}]) for text in texts])
    for number, ids in enumerate(prompts):
        renderer.check_slots(ids, ())
        if len(ids) > limit:
            raise UsageError(f"input {number} has {len(ids)} tokens; the engine takes {limit}")
    current_risk.set(RequestRisk(reason="moderations have no answers", verdicts=verdicts))
    sampling = SamplingParams(max_tokens=1)
    streams = [
        engine.generate(tokens_input(ids, cache_salt=join_salts()), sampling.clone(), f"modr-{uuid.uuid4().hex}")
        for ids in prompts
    ]
    await asyncio.gather(*map(_exhaust, streams))
    if any(None in verdicts.risks.get(number, (None,)) for number in range(len(texts))):
        raise BusyError("the engine could not score a text. Try again")
    return sum(map(len, prompts))


def build_moderation_response(model: str, verdicts: PromptVerdicts, tokens: int) -> dict[str, Any]:
    """Build the response to a request whose texts are scored: a category per label, or per detector without labels.

    Args:
        model: name of the base model.
        verdicts: verdicts on the texts, by their index.
        tokens: number of tokens of all texts.
    """
    results: list[dict[str, Any]] = []
    names = _name_categories(verdicts)
    for number in sorted(verdicts.risks):
        entries = verdicts.describe(number)
        flags = {name: entry["flagged"] for name, entry in zip(names, entries, strict=True)}
        scores = {name: entry["probability"] for name, entry in zip(names, entries, strict=True)}
        kinds = {name: ["text"] for name in flags}
        result = {"flagged": any(flags.values()), "categories": flags, "category_scores": scores}
        results.append(result | {"category_applied_input_types": kinds})
    keys = ("name", "label", "version", "run_id", "threshold", "false_positive_rate")
    detectors = [{key: entry[key] for key in keys} for entry in verdicts.describe(0)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    response = {"id": f"modr-{uuid.uuid4().hex}", "model": model, "results": results, "usage": usage}
    return response | {"trimtab": {"detectors": detectors}}


def _name_categories(verdicts: PromptVerdicts) -> list[str]:
    """Return the name of the category of each policy: its label, with its detector if another one has the same label."""
    entries = verdicts.describe(0)
    labels = [entry["label"] or entry["name"] for entry in entries]
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        f"{entry['name']}/{label}" if label in repeated and entry["label"] else label
        for label, entry in zip(labels, entries, strict=True)
    ]


async def _exhaust(stream: AsyncGenerator[Any]) -> None:
    async for _ in stream:
        pass


def _parse_inputs(value: Any) -> list[str]:
    """Return the texts of `input`: a text, or a list of texts or of objects with type `text`."""
    listed: list[Any] = value if isinstance(value, list) else [value]
    parts: list[Any] = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in listed]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise UsageError("input must be a text, or a list of texts: only text can be moderated")
    if len(parts) > MAX_INPUTS:
        raise UsageError(f"input must have at most {MAX_INPUTS} texts, not {len(parts)}")
    return parts

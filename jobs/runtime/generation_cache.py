"""Cache of generated answers, keyed by base model and request."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Answer
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.engine_pool import EngineWork, GenerationRequest, SendToEngine, run_pool
from trimtab.jobs.runtime.jsonl import append_jsonl, read_jsonl
from trimtab.model.base_model import BaseModel
from trimtab.types import TargetRung


@dataclass(frozen=True)
class CachedAnswer:
    """Cached answer.

    Attributes:
        text: text of the answer.
        tokens: length in tokens.
        finished: whether the model ended the answer, instead of the token limit.
        mean_log_probability: mean log-probability of its tokens.
        rung: rung of the target ladder that produced it, None for other answers.
    """

    text: str
    tokens: int
    finished: bool
    mean_log_probability: float
    rung: TargetRung | None = None


def generate_cached(
    title: str,
    base: BaseModel,
    requests: Sequence[GenerationRequest],
    engine: EngineConfig,
    scale: ScaleConfig,
    work: EngineWork[list[CachedAnswer]] | None = None,
) -> dict[str, list[CachedAnswer]]:
    """Return the answers to requests, from the cache or newly generated.

    Each batch is cached as soon as it is generated, so that an interruption loses little work.

    Args:
        title: title of the progress bar.
        base: base model that generates the answers.
        requests: generation requests.
        engine: settings of the engines.
        scale: cluster resources.
        work: function that processes a batch on an engine; None for plain generation.

    Returns:
        Answers by the keys of the requests.

    Raises:
        TrimtabError: if an engine rejects a request.
        JobError: if an engine is lost.
    """
    by_key = {request.key(engine.dtype): request for request in requests}
    cached = read_cached(base, set(by_key))
    missing = {key: request for key, request in by_key.items() if key not in cached}
    if missing:
        with closing(run_pool(title, base, missing, engine, scale, None, work or generate_answers)) as batches:
            for batch in batches:
                append_cached(base, batch)
                cached |= batch
    return cached


def generate_answers(send: SendToEngine, requests: Sequence[GenerationRequest]) -> list[list[CachedAnswer]]:
    """Generate the answers to each request; the `EngineWork` of plain generation."""
    return [[convert_answer(answer) for answer in answers] for answers in send(requests)]


def read_cached(base: BaseModel, keys: set[str]) -> dict[str, list[CachedAnswer]]:
    """Return the cached answers of a base model by request key; keys without answers are omitted."""
    rows = (row for row in read_jsonl(_get_file(base)) if row["key"] in keys)
    return {row["key"]: [_parse_answer(answer) for answer in row["answers"]] for row in rows}


def append_cached(base: BaseModel, answers: Mapping[str, Sequence[CachedAnswer]]) -> None:
    """Add answers, by request key, to the cache of a base model."""
    rows = ({"key": key, "answers": [_as_json(a) for a in cached]} for key, cached in answers.items())
    append_jsonl(_get_file(base), rows)


def _get_file(base: BaseModel) -> Path:
    return settings.get_home() / "answers" / f"{base.fingerprint}.jsonl"


def convert_answer(answer: Answer) -> CachedAnswer:
    """Convert an engine's answer."""
    return CachedAnswer(answer.text, len(answer.token_ids), answer.finish_reason == "stop", answer.mean_log_probability)


def _as_json(answer: CachedAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "whole": answer.finished,
        "likelihood": answer.mean_log_probability,
        **({"rung": answer.rung} if answer.rung else {}),
    }


def _parse_answer(raw: dict[str, Any]) -> CachedAnswer:
    return CachedAnswer(raw["text"], raw["tokens"], raw["whole"], raw["likelihood"], raw.get("rung"))

"""Answers of the frozen model, drawn once and kept for every later run on the same base model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab import settings
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Answer
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest, generate_batches
from trimtab.jobs.runtime.jsonl import append_jsonl, read_jsonl
from trimtab.model.base_model import BaseModel


@dataclass(frozen=True)
class CachedAnswer:
    """One answer: its text and length in tokens, whether the model ended it, and the mean log-probability of its tokens."""

    text: str
    tokens: int
    whole: bool
    likelihood: float


def generate_cached(
    title: str, base: BaseModel, requests: Sequence[GenerationRequest], engine: EngineConfig, scale: ScaleConfig
) -> dict[str, list[CachedAnswer]]:
    """Answers by the requests' keys, from the store or drawn now; what comes in is kept at once, so that a stop loses little.

    Raises errors of ours for what an engine refuses.
    """
    wanted = {request.key(engine.precision): request for request in requests}
    kept = read_cached(base, set(wanted))
    missing = {key: request for key, request in wanted.items() if key not in kept}
    if missing:
        for batch in generate_batches(title, base, missing, engine, scale):
            drawn = {key: [_drawn(a) for a in answers] for key, answers in batch.items()}
            append_cached(base, drawn)
            kept |= drawn
    return kept


def read_cached(base: BaseModel, keys: set[str]) -> dict[str, list[CachedAnswer]]:
    """Answers that are kept for these keys."""
    found = (row for row in read_jsonl(_file(base)) if row["key"] in keys)
    return {row["key"]: [CachedAnswer(**answer) for answer in row["answers"]] for row in found}


def append_cached(base: BaseModel, answers: Mapping[str, Sequence[CachedAnswer]]) -> None:
    """Keep answers by their keys."""
    append_jsonl(_file(base), ({"key": key, "answers": [asdict(d) for d in drawn]} for key, drawn in answers.items()))


def _file(base: BaseModel) -> Path:
    return settings.get_home() / "answers" / f"{base.fingerprint}.jsonl"


def _drawn(answer: Answer) -> CachedAnswer:
    return CachedAnswer(answer.text, len(answer.token_ids), answer.finish_reason == "stop", answer.mean_log_probability)

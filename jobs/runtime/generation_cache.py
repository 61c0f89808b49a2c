"""Answers of the frozen model, drawn once and kept for every later run on the same base model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab import settings
from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Answer
from trimtab.jobs.runtime import engine_pool, jsonl
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.engine_pool import Request
from trimtab.model.base_model import BaseModel


@dataclass(frozen=True)
class Drawn:
    """One answer: its text and length in tokens, whether the model ended it, and the mean log-probability of its tokens."""

    text: str
    tokens: int
    whole: bool
    likelihood: float


def answer(
    title: str, base: BaseModel, requests: Sequence[Request], engine: EngineConfig, scale: ScaleConfig
) -> dict[str, list[Drawn]]:
    """Answers by the requests' keys, from the store or drawn now; what comes in is kept at once, so that a stop loses little.

    Raises errors of ours for what an engine refuses.
    """
    wanted = {request.key(engine.precision): request for request in requests}
    kept = read(base, set(wanted))
    missing = {key: request for key, request in wanted.items() if key not in kept}
    if missing:
        for batch in engine_pool.batches(title, base, missing, engine, scale):
            drawn = {key: [_drawn(a) for a in answers] for key, answers in batch.items()}
            append(base, drawn)
            kept |= drawn
    return kept


def read(base: BaseModel, keys: set[str]) -> dict[str, list[Drawn]]:
    """Answers that are kept for these keys."""
    found = (row for row in jsonl.read(_file(base)) if row["key"] in keys)
    return {row["key"]: [Drawn(**answer) for answer in row["answers"]] for row in found}


def append(base: BaseModel, answers: Mapping[str, Sequence[Drawn]]) -> None:
    """Keep answers by their keys."""
    jsonl.append(_file(base), ({"key": key, "answers": [asdict(d) for d in drawn]} for key, drawn in answers.items()))


def _file(base: BaseModel) -> Path:
    return settings.home() / "answers" / f"{base.fingerprint}.jsonl"


def _drawn(answer: Answer) -> Drawn:
    return Drawn(answer.text, len(answer.token_ids), answer.finished == "stop", answer.likelihood)

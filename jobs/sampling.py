"""Answers of the frozen model, drawn once and kept for every later run on the same base model."""

from collections.abc import Sequence

from trimtab.engine.config import EngineConfig
from trimtab.generation_types import Answer
from trimtab.jobs import answer_store, engines
from trimtab.jobs.answer_store import Drawn, Request
from trimtab.jobs.config import ScaleConfig
from trimtab.model.base_model import BaseModel


def answer(
    title: str, base: BaseModel, requests: Sequence[Request], engine: EngineConfig, scale: ScaleConfig
) -> dict[str, list[Drawn]]:
    """Answers by the requests' keys, from the store or drawn now; what comes in is kept at once, so that a stop loses little.

    Raises errors of ours for what an engine refuses.
    """
    wanted = {request.key(engine.precision): request for request in requests}
    kept = answer_store.read(base, set(wanted))
    missing = {key: request for key, request in wanted.items() if key not in kept}
    if missing:
        for batch in engines.batches(title, base, missing, engine, scale):
            drawn = {key: [_drawn(a) for a in answers] for key, answers in batch.items()}
            answer_store.append(base, drawn)
            kept |= drawn
    return kept


def _drawn(answer: Answer) -> Drawn:
    return Drawn(answer.text, len(answer.token_ids), answer.finished == "stop", answer.likelihood)

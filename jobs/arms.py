"""Answering prompts under several arms with one engine, as a task on the cluster."""

from collections.abc import Mapping, Sequence

from trimtab import nodes
from trimtab.base import BaseModel
from trimtab.data.rows import Prompt, fraction
from trimtab.engine.config import EngineConfig
from trimtab.evaluate.safety import SAFETY_PROMPT, Arm, ArmResult
from trimtab.prefix import Prefix
from trimtab.words import BASE_ARM, TEXT_ARM

from .cluster import run_task


def standard_arms(prefixes: Mapping[str, Prefix]) -> list[Arm]:
    """The base model, the safety text prompt, and each prefix."""
    return [Arm(BASE_ARM), Arm(TEXT_ARM, system=SAFETY_PROMPT), *(Arm(name, prefix=p) for name, p in prefixes.items())]


def evaluate(
    base: BaseModel,
    arms: Sequence[Arm],
    parts: Mapping[str, Sequence[Prompt]],
    max_tokens: int,
    engine: EngineConfig,
    gpus: float,
) -> dict[str, list[ArmResult]]:
    """Results of every arm on every part, computed by one engine on the cluster."""
    return run_task(
        "answers of all arms",
        "trimtab.jobs.engine_tasks:evaluate_arms",
        base,
        list(arms),
        dict(parts),
        max_tokens,
        engine,
        cpus=nodes.cores(),
        gpus=gpus,
    )


def limited(prompts: Sequence[Prompt], limit: int, seed: int = 0) -> list[Prompt]:
    """At most `limit` prompts of each side, chosen by a hash so that more data changes little; 0 takes all."""
    if not limit:
        return list(prompts)
    sides: list[Prompt] = []
    for harmful in (True, False):
        mine = [p for p in prompts if (p.label == "harmful") == harmful]
        sides += sorted(mine, key=lambda p: fraction(p.prompt, seed))[:limit]
    return sides

"""Answering prompts under several arms with one engine, as a task on the cluster."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trimtab.artifacts.prefix import Prefix
from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.engine.config import EngineConfig
from trimtab.evaluation.safety.results import SAFETY_PROMPT, Arm, ArmResult, judge_answers
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.runtime.cluster import stream_task
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import BASE_ARM, TEXT_ARM, Precision

TITLE = "answers of all arms"
# Prompts that the engine is given at once, at least: so many that the last of them, which leave room, take little of the time.
TOGETHER = 2048


@dataclass(frozen=True)
class ArmBatch:
    """Prompts that an arm is to answer in at most `max_tokens` tokens each."""

    arm: Arm
    prompts: Sequence[Prompt]
    max_tokens: int


def build_standard_arms(prefixes: Mapping[str, Prefix]) -> list[Arm]:
    """The base model, the safety text prompt, and each prefix."""
    return [Arm(BASE_ARM), Arm(TEXT_ARM, system=SAFETY_PROMPT), *(Arm(name, prefix=p) for name, p in prefixes.items())]


def build_engine_config(precision: Precision) -> EngineConfig:
    """An engine for prompts of any user, under many arms at once."""
    return EngineConfig(rows=256, precision=precision, max_length=2048)


def evaluate_arms(
    base: BaseModel,
    arms: Sequence[Arm],
    parts: Mapping[str, Sequence[Prompt]],
    max_tokens: int,
    setting: EngineConfig,
    gpus: float,
) -> dict[str, list[ArmResult]]:
    """Results of every arm on every part, computed by one engine on the cluster."""
    batches = [ArmBatch(arm, prompts, max_tokens) for prompts in parts.values() for arm in arms]
    said = iter(list(_generate_answers(TITLE, base, batches, setting, gpus)))
    return {part: [judge_answers(arm, prompts, next(said)) for arm in arms] for part, prompts in parts.items()}


def generate_missing(title: str, base: BaseModel, arms: Sequence[Arm], stores: Sequence[ArmCache], gpus: float) -> None:
    """Ask what is not kept yet, all of it of one engine; what it has answered is kept while it goes on. The stores are of one
    precision."""
    missing = [(store, arm) for store in stores for arm in arms if not store.has_answers(arm)]
    if missing:
        batches = [ArmBatch(arm, store.prompts, store.limit) for store, arm in missing]
        said = _generate_answers(title, base, batches, build_engine_config(stores[0].precision), gpus)
        for (store, arm), answers in zip(missing, said, strict=True):
            store.write_answers(arm, answers)


def group_batches(batches: Iterable[ArmBatch]) -> Iterator[list[ArmBatch]]:
    """Batches that the engine is given at once."""
    group = list[ArmBatch]()
    for batch in batches:
        group.append(batch)
        if sum(len(one.prompts) for one in group) >= TOGETHER:
            yield group
            group = []
    if group:
        yield group


def limit_prompts(prompts: Sequence[Prompt], limit: int, seed: int = 0) -> list[Prompt]:
    """At most `limit` prompts of each side, chosen by a hash so that more data changes little; 0 takes all."""
    if not limit:
        return list(prompts)
    sides: list[Prompt] = []
    for harmful in (True, False):
        mine = [p for p in prompts if (p.label == "harmful") == harmful]
        sides += sorted(mine, key=lambda p: hash_to_fraction(p.prompt, seed))[:limit]
    return sides


def _generate_answers(
    title: str, base: BaseModel, batches: Sequence[ArmBatch], setting: EngineConfig, gpus: float
) -> Iterator[list[str]]:
    """The answers of each batch, as they come."""
    task = "trimtab.jobs.evaluate.generation_task:generate_answers"
    return stream_task(title, task, base, batches, setting, cpus=get_max_node_cores(), gpus=gpus)

"""Answering prompts under several arms with one engine, as a task on the cluster."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trimtab import ray_connection
from trimtab.artifacts.prefix import Prefix
from trimtab.data.prompt import Prompt, fraction
from trimtab.engine.config import EngineConfig
from trimtab.evaluation.safety import results
from trimtab.evaluation.safety.results import SAFETY_PROMPT, Arm, ArmResult
from trimtab.jobs.evaluate.arm_cache import Store
from trimtab.jobs.runtime.cluster import stream_task
from trimtab.model.base_model import BaseModel
from trimtab.types import BASE_ARM, TEXT_ARM, Precision

TITLE = "answers of all arms"
# Prompts that the engine is given at once, at least: so many that the last of them, which leave room, take little of the time.
TOGETHER = 2048


@dataclass(frozen=True)
class Batch:
    """Prompts that an arm is to answer in at most `max_tokens` tokens each."""

    arm: Arm
    prompts: Sequence[Prompt]
    max_tokens: int


def standard_arms(prefixes: Mapping[str, Prefix]) -> list[Arm]:
    """The base model, the safety text prompt, and each prefix."""
    return [Arm(BASE_ARM), Arm(TEXT_ARM, system=SAFETY_PROMPT), *(Arm(name, prefix=p) for name, p in prefixes.items())]


def engine(precision: Precision) -> EngineConfig:
    """An engine for prompts of any user, under many arms at once."""
    return EngineConfig(rows=256, precision=precision, max_length=2048)


def evaluate(
    base: BaseModel,
    arms: Sequence[Arm],
    parts: Mapping[str, Sequence[Prompt]],
    max_tokens: int,
    setting: EngineConfig,
    gpus: float,
) -> dict[str, list[ArmResult]]:
    """Results of every arm on every part, computed by one engine on the cluster."""
    batches = [Batch(arm, prompts, max_tokens) for prompts in parts.values() for arm in arms]
    said = iter(list(_answered(TITLE, base, batches, setting, gpus)))
    return {part: [results.judged(arm, prompts, next(said)) for arm in arms] for part, prompts in parts.items()}


def keep_answers(title: str, base: BaseModel, arms: Sequence[Arm], stores: Sequence[Store], gpus: float) -> None:
    """Ask what is not kept yet, all of it of one engine; what it has answered is kept while it goes on. The stores are of one
    precision."""
    missing = [(store, arm) for store in stores for arm in arms if not store.has_answers(arm)]
    if missing:
        batches = [Batch(arm, store.prompts, store.limit) for store, arm in missing]
        said = _answered(title, base, batches, engine(stores[0].precision), gpus)
        for (store, arm), answers in zip(missing, said, strict=True):
            store.put_answers(arm, answers)


def grouped(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches that the engine is given at once."""
    group = list[Batch]()
    for batch in batches:
        group.append(batch)
        if sum(len(one.prompts) for one in group) >= TOGETHER:
            yield group
            group = []
    if group:
        yield group


def limited(prompts: Sequence[Prompt], limit: int, seed: int = 0) -> list[Prompt]:
    """At most `limit` prompts of each side, chosen by a hash so that more data changes little; 0 takes all."""
    if not limit:
        return list(prompts)
    sides: list[Prompt] = []
    for harmful in (True, False):
        mine = [p for p in prompts if (p.label == "harmful") == harmful]
        sides += sorted(mine, key=lambda p: fraction(p.prompt, seed))[:limit]
    return sides


def _answered(title: str, base: BaseModel, batches: Sequence[Batch], setting: EngineConfig, gpus: float) -> Iterator[list[str]]:
    """The answers of each batch, as they come."""
    task = "trimtab.jobs.evaluate.generation_task:answer"
    return stream_task(title, task, base, batches, setting, cpus=ray_connection.cores(), gpus=gpus)

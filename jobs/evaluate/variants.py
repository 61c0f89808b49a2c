"""Generation of answers under several arms with one engine, as a task on the cluster."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.detection.detector import Detector
from trimtab.engine.config import EngineConfig
from trimtab.evaluation.safety.results import SAFETY_PROMPT, Arm, ArmResult, judge_answers
from trimtab.jobs.evaluate.arm_cache import ArmCache
from trimtab.jobs.runtime.cluster import stream_task
from trimtab.model.base_model import BaseModel
from trimtab.ray_connection import get_max_node_cores
from trimtab.types import BASE_ARM, TEXT_ARM, DType

TITLE = "answers of all arms"
# Minimum number of prompts per engine call. At the end of a call the engine is not fully used, so calls are large.
TOGETHER = 2048


@dataclass(frozen=True)
class ArmBatch:
    """Prompts of one arm.

    Attributes:
        arm: arm that answers.
        prompts: prompts to answer.
        max_tokens: maximum length of each answer, in tokens.
        detector: detector of prompts, to compute the risks of the prompts instead of answers.
    """

    arm: Arm
    prompts: Sequence[Prompt]
    max_tokens: int
    detector: Detector | None = None


def build_standard_arms(prefixes: Mapping[str, Prefix]) -> list[Arm]:
    """Build the arms of the base model, the safety text prompt, and each prefix."""
    return [Arm(BASE_ARM), Arm(TEXT_ARM, system=SAFETY_PROMPT), *(Arm(name, prefix=p) for name, p in prefixes.items())]


def build_engine_config(precision: DType) -> EngineConfig:
    """Build the engine configuration for prompts of any origin under many concurrent arms."""
    return EngineConfig(num_slots=256, dtype=precision, max_model_len=2048)


def evaluate_arms(
    base: BaseModel,
    arms: Sequence[Arm],
    parts: Mapping[str, Sequence[Prompt]],
    max_tokens: int,
    config: EngineConfig,
    gpus: float,
) -> dict[str, list[ArmResult]]:
    """Generate and judge the answers of every arm on every part, with one engine on the cluster.

    Args:
        base: base model.
        arms: arms to evaluate.
        parts: prompts by part.
        max_tokens: maximum length of each answer, in tokens.
        config: configuration of the engine.
        gpus: number of GPUs for the engine.

    Returns:
        Results of the arms by part, with the verdicts of the string match.
    """
    batches = [ArmBatch(arm, prompts, max_tokens) for prompts in parts.values() for arm in arms]
    answers = iter(list(_generate_answers(TITLE, base, batches, config, gpus)))
    return {part: [judge_answers(arm, prompts, next(answers)) for arm in arms] for part, prompts in parts.items()}


def evaluate_guarded_arms(
    base: BaseModel,
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    max_tokens: int,
    config: EngineConfig,
    gpus: float,
    detector: Detector,
) -> tuple[list[ArmResult], list[float]]:
    """Generate and judge the answers of every arm, and compute the risks of the prompts, with one engine on the cluster.

    Args:
        base: base model.
        arms: arms to evaluate.
        prompts: prompts of every arm.
        max_tokens: maximum length of each answer, in tokens.
        config: configuration of the engine.
        gpus: number of GPUs for the engine.
        detector: detector of prompts, which reads those of the plain base model.

    Returns:
        Results of the arms, with the verdicts of the string match, and the risk of each prompt.
    """
    batches = [ArmBatch(Arm(BASE_ARM), prompts, 1, detector), *(ArmBatch(arm, prompts, max_tokens) for arm in arms)]
    risks, *answers = generate_batches(TITLE, base, batches, config, gpus)
    results = [judge_answers(arm, prompts, texts) for arm, texts in zip(arms, answers, strict=True)]
    return results, [float(risk) for risk in risks]


def generate_batches(
    title: str, base: BaseModel, batches: Sequence[ArmBatch], config: EngineConfig, gpus: float
) -> list[list[Any]]:
    """Return the answers or risks of each batch, from one engine that captures the layers of the batches' detectors.

    Args:
        title: title of the progress bar.
        base: base model.
        batches: prompts by arm.
        config: configuration of the engine.
        gpus: number of GPUs for the engine.
    """
    layers = {layer for batch in batches if batch.detector for layer in batch.detector.card.layers}
    return list(_generate_answers(title, base, batches, replace(config, layers=tuple(sorted(layers))), gpus))


def compute_prompt_risks(
    base: BaseModel, prompts: Sequence[Prompt], config: EngineConfig, gpus: float, detector: Detector
) -> list[float]:
    """Compute the risk of each prompt by a detector of prompts, with one engine on the cluster.

    Arguments are those of `evaluate_guarded_arms`.
    """
    batches = [ArmBatch(Arm(BASE_ARM), prompts, 1, detector)]
    (risks,) = generate_batches("risks of the prompts", base, batches, config, gpus)
    return [float(risk) for risk in risks]


def generate_missing(title: str, base: BaseModel, arms: Sequence[Arm], caches: Sequence[ArmCache], gpus: float) -> None:
    """Generate the answers that are not cached, with one engine, and write each arm's answers as they arrive.

    Args:
        title: title of the progress bar.
        base: base model.
        arms: arms that answer the prompts of every cache.
        caches: caches, all of one precision.
        gpus: number of GPUs for the engine.
    """
    missing = [(cache, arm) for cache in caches for arm in arms if not cache.has_answers(arm)]
    if missing:
        batches = [ArmBatch(arm, cache.prompts, cache.limit) for cache, arm in missing]
        generated = _generate_answers(title, base, batches, build_engine_config(caches[0].dtype), gpus)
        for (cache, arm), answers in zip(missing, generated, strict=True):
            cache.write_answers(arm, answers)


def group_batches(batches: Iterable[ArmBatch]) -> Iterator[list[ArmBatch]]:
    """Group batches so that each group has enough prompts for one engine call; a batch with a detector stands alone."""
    group = list[ArmBatch]()
    for batch in batches:
        if batch.detector is not None:
            yield from ([group] if group else [])
            yield [batch]
            group = []
            continue
        group.append(batch)
        if sum(len(item.prompts) for item in group) >= TOGETHER:
            yield group
            group = []
    if group:
        yield group


def limit_prompts(prompts: Sequence[Prompt], limit: int, seed: int = 0) -> list[Prompt]:
    """Limit the harmful and the benign prompts.

    Args:
        prompts: prompts.
        limit: maximum number of harmful prompts, and of benign prompts; 0 for all.
        seed: seed of the hash that selects prompts; added data changes few of the selected prompts.
    """
    if not limit:
        return list(prompts)
    selected: list[Prompt] = []
    for harmful in (True, False):
        side = [p for p in prompts if (p.label == "harmful") == harmful]
        selected += sorted(side, key=lambda p: hash_to_fraction(p.prompt, seed))[:limit]
    return selected


def _generate_answers(
    title: str, base: BaseModel, batches: Sequence[ArmBatch], config: EngineConfig, gpus: float
) -> Iterator[list[Any]]:
    """Yield the answers or risks of each batch as they arrive."""
    task = "trimtab.jobs.evaluate.generation_task:generate_answers"
    return stream_task(title, task, base, batches, config, cpus=get_max_node_cores(), gpus=gpus)

"""Arms of a study that act on the verdict of a detector of prompts."""

from collections.abc import Collection, Mapping, Sequence

from trimtab.artifacts.card import PrefixCondition
from trimtab.data.prompt import compute_prompt_key
from trimtab.engine.config import EngineConfig
from trimtab.evaluation.safety.guarded import build_conditional_results, build_guard_result
from trimtab.evaluation.safety.results import ArmResult
from trimtab.jobs.evaluate.conditions import judge_prompts, resolve_condition
from trimtab.model.base_model import BaseModel


def add_guarded_arms(
    condition: PrefixCondition,
    base: BaseModel,
    parts: Mapping[str, Sequence[ArmResult]],
    trained: Collection[str],
    engine: EngineConfig,
    gpus: float,
) -> dict[str, list[ArmResult]]:
    """Return the results with the arms `guard`, `conditional` and `conditional help` of each trained prefix.

    Args:
        condition: detector and threshold; prompts above it are flagged.
        base: base model.
        parts: results of the arms by part, that of the base model first.
        trained: names of the trained prefixes.
        engine: configuration of the engine that computes the risks.
        gpus: number of GPUs for the engine.
    """
    prompts = [answer.prompt for arms in parts.values() for answer in arms[0].answers]
    judged = judge_prompts(resolve_condition(condition, base), base, prompts, engine, gpus)
    added: dict[str, list[ArmResult]] = {}
    for part, arms in parts.items():
        flagged = [judged.steered[compute_prompt_key(answer.prompt)] for answer in arms[0].answers]
        steered = [arm for arm in arms if arm.name in trained]
        guarded = [build_guard_result(arms[0], flagged), *build_conditional_results(arms[0], steered, flagged)]
        added[part] = [*arms, *guarded]
    return added

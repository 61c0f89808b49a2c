"""Sides of prompts for conditional prefixes, by the verdicts of their detectors.

A detector knows the prompts that it was trained on. For these, the out-of-fold risks of its run count, so that a prefix is
trained and measured on the errors that it will meet in service.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from trimtab.artifacts.card import PrefixCondition
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import print_line
from trimtab.data.prompt import Prompt, compute_prompt_key
from trimtab.detection.detector import Detector, check_base
from trimtab.detection.detector_card import select_threshold
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.evaluation.safety.guarded import build_guarded_results, refuse_prompt
from trimtab.evaluation.safety.results import ArmResult, summarize_answers
from trimtab.jobs.evaluate.variants import compute_prompt_risks
from trimtab.loading import load_detector
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.tracking.run_artifacts import read_json_artifact
from trimtab.util.identifiers import split_reference

T = TypeVar("T")
# Artifact of a detector's run with its out-of-fold risks by key of the prompt.
OUT_OF_FOLD = "evaluation/out_of_fold.json"


@dataclass(frozen=True)
class ConditionedPrompts:
    """Prompts that a conditional prefix steers.

    Attributes:
        condition: condition of the prefix.
        steered: whether the prefix steers a prompt, by key.
    """

    condition: PrefixCondition
    steered: Mapping[str, bool] = field(repr=False)

    def select(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Return the prompts that the prefix steers."""
        return [prompt for prompt in prompts if self.steered[compute_prompt_key(prompt)]]

    def compose(self, prefix: ArmResult, base: ArmResult) -> ArmResult:
        """Return the result of the prefix with the answers of the condition to the prompts that it does not steer."""
        others = [refuse_prompt(answer) for answer in base.answers] if self.condition.otherwise == "refuse" else base.answers
        chosen = self.choose([answer.prompt for answer in prefix.answers], prefix.answers, others)
        return summarize_answers(prefix.name, chosen)

    def choose(self, prompts: Iterable[Prompt], steered: Iterable[T], others: Iterable[T]) -> list[T]:
        """Return the first value for each prompt that the prefix steers, and the second one for the others."""
        rows = zip(prompts, steered, others, strict=True)
        return [own if self.steered[compute_prompt_key(prompt)] else other for prompt, own, other in rows]


def resolve_condition(condition: PrefixCondition, base: BaseModel) -> PrefixCondition:
    """Return a condition with the version and the threshold that its detector has now.

    Raises:
        NotFoundError: if there is no such detector.
        UsageError: if the detector reads answers or prompts with a prefix, or does not have the threshold.
    """
    version = _find_version(condition, base)
    detector = load_prompt_detector(f"{version.name}@{version.version}", base)
    threshold = select_threshold(detector.card, condition.threshold, condition.false_positive_rate)
    return PrefixCondition(f"{version.name}@{version.version}", condition.side, threshold, otherwise=condition.otherwise)


def load_prompt_detector(name: str, base: BaseModel) -> Detector:
    """Load a detector that reads prompts of the plain base model, by folder or registry name.

    Raises:
        UsageError: if it reads answers, or was trained under a prefix.
    """
    detector = load_detector(name, base.name)
    check_base(detector.card, base)
    if detector.card.subject != "prompt" or detector.card.prefix_digest is not None:
        raise UsageError(f"detector {name!r} must read prompts without a prefix. Train one on collect --subject prompt")
    return detector


def judge_prompts(
    condition: PrefixCondition, base: BaseModel, prompts: Sequence[Prompt], engine: EngineConfig, gpus: float
) -> ConditionedPrompts:
    """Determine which prompts a prefix steers.

    Args:
        condition: condition of the prefix, from `resolve_condition`.
        base: base model.
        prompts: prompts.
        engine: configuration of the engine that computes the risks of prompts that the detector's run did not record.
        gpus: number of GPUs for the engine.
    """
    version = _find_version(condition, base)
    unique = {compute_prompt_key(prompt): prompt for prompt in prompts}
    risks = read_out_of_fold(version.run_id, unique)
    if missing := [key for key in unique if key not in risks]:
        detector = registry.load_detector(version, base)
        computed = compute_prompt_risks(base, [unique[key] for key in missing], engine, gpus, detector)
        risks |= dict(zip(missing, computed, strict=True))
    above, threshold = condition.side == "above", condition.threshold or 0.0
    return ConditionedPrompts(condition, {key: (risk > threshold) == above for key, risk in risks.items()})


def apply_conditions(
    base: BaseModel,
    prefixes: Mapping[str, Prefix],
    parts: Mapping[str, Sequence[ArmResult]],
    engine: EngineConfig,
    gpus: float,
    precomputed: ConditionedPrompts | None = None,
) -> dict[str, list[ArmResult]]:
    """Replace the results of conditional prefixes by those that they have under their conditions.

    Args:
        base: base model.
        prefixes: prefixes by name of the arm.
        parts: results of the arms by part, that of the base model first.
        engine: configuration of the engine.
        gpus: number of GPUs for the engine.
        precomputed: sides of all prompts for a condition, if they were computed before.
    """
    prompts = [answer.prompt for arms in parts.values() for answer in arms[0].answers]
    judged: dict[str, ConditionedPrompts] = {}
    for name, prefix in prefixes.items():
        if (condition := prefix.card.condition) is not None:
            resolved = resolve_condition(condition, base)
            is_same = precomputed is not None and precomputed.condition == resolved
            judged[name] = precomputed if precomputed and is_same else judge_prompts(resolved, base, prompts, engine, gpus)
    return {
        part: [judged[result.name].compose(result, arms[0]) if result.name in judged else result for result in arms]
        for part, arms in parts.items()
    }


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
        added[part] = [*arms, *build_guarded_results(arms[0], steered, flagged)]
    return added


def _find_version(condition: PrefixCondition, base: BaseModel) -> Version:
    name, ref = split_reference(condition.detector)
    return registry.find_version(base.name, name, ref or registry.CHAMPION)


def replace_trained_risks(detector: Detector, prompts: Sequence[Prompt], risks: Sequence[float]) -> list[float]:
    """Return risks in which those of prompts that the detector was trained on are out of fold, and print their number.

    Args:
        detector: detector of prompts.
        prompts: prompts.
        risks: risks of the prompts by the detector.

    Raises:
        TrackingError: if the run of the detector cannot be read.
    """
    keys = [compute_prompt_key(prompt) for prompt in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    recorded = read_out_of_fold(detector.card.run_id, unique) if detector.card.run_id else {}
    if trained := sum(key in recorded for key in keys):
        print_line(f"{detector.card.name} was trained on {trained} of {len(prompts)} prompts, whose risks are out of fold")
    return [recorded.get(key, risk) for key, risk in zip(keys, risks, strict=True)]


def read_out_of_fold(run_id: str, prompts: Mapping[str, Prompt]) -> dict[str, float]:
    """Return the out-of-fold risks of prompts by key; a prompt with a system message has the risk of the one without.

    Args:
        run_id: id of the run that trained the detector.
        prompts: prompts by key.

    Raises:
        TrackingError: if the run cannot be read.
    """
    recorded = read_json_artifact(run_id, OUT_OF_FOLD)
    keys = {key: compute_prompt_key(replace(prompt, system=None)) for key, prompt in prompts.items()}
    return {key: recorded[plain] for key, plain in keys.items() if plain in recorded}

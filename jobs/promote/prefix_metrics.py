"""Figures for the gate of prefixes: the version and its champion answer the same prompts, in one engine."""

from collections.abc import Mapping, Sequence

from trimtab.data.readers import read_all_prompts
from trimtab.errors import UsageError
from trimtab.evaluation.promotion_rules import Found, PromotionRule
from trimtab.evaluation.safety.comparison import Measure, estimate_difference, pool_over_seeds
from trimtab.evaluation.safety.results import Arm, ArmResult
from trimtab.jobs.evaluate.variants import build_engine_config, evaluate_arms
from trimtab.jobs.judges.runner import apply_judge, open_judge
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version

# What a figure is about: True is the harmful side.
SIDES: dict[Measure, tuple[bool, ...]] = {"refusal": (True,), "compliance": (False,), "balanced": (True, False), "partial": ()}
MINE, THEIRS = "version", "champion"


def measure_prefix(
    config: PromoteConfig, base: BaseModel, rules: Sequence[PromotionRule], version: Version, champion: Version | None
) -> Mapping[PromotionRule, Found]:
    """What each rule's figure is, and how much more than the champion's. Raises UsageError for rules that cannot be checked."""
    for rule in rules:
        if _measure(rule) == "partial" and rule.over_champion is not None:
            raise UsageError("rule on partial: it is held against a bound only, not against the champion")
    sets = {name: read_all_prompts([name], None, config.columns) for name in dict.fromkeys(rule.set or "" for rule in rules)}
    chosen = [Arm(MINE, prefix=registry.load_prefix(version, base))]
    if champion is not None:
        chosen.append(Arm(THEIRS, prefix=registry.load_prefix(champion, base)))
    judge = open_judge(config.judge, base, config.gpus)
    with ray_session(config.address):
        results = evaluate_arms(base, chosen, sets, config.max_tokens, build_engine_config(config.precision), config.gpus)
        results = apply_judge(results, judge, config.gpus)
    return {rule: _figures(rule, results[rule.set or ""]) for rule in rules}


def _figures(rule: PromotionRule, results: Sequence[ArmResult]) -> Found:
    mine, theirs, measure = results[0], results[1:], _measure(rule)
    found = pool_over_seeds([mine], measure)
    if not found.count:
        raise UsageError(f"rule on {rule.metric}: {rule.set} has no prompts of that side")
    sides = SIDES[measure]
    more = estimate_difference([mine], theirs, sides=sides) if theirs and sides else None
    return found, more


def _measure(rule: PromotionRule) -> Measure:
    for measure in SIDES:
        if measure == rule.metric:
            return measure
    raise UsageError(f"rule on {rule.metric}: a prefix has {', '.join(SIDES)} on a set")

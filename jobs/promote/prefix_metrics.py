"""Gate metrics of prefixes, with the version and its champion on the same prompts in one engine."""

from collections.abc import Mapping, Sequence

from trimtab.data.readers import read_all_prompts
from trimtab.errors import UsageError
from trimtab.evaluation.promotion_rules import MeasuredMetrics, PromotionRule
from trimtab.evaluation.safety.comparison import estimate_difference, pool_over_seeds
from trimtab.evaluation.safety.results import MEASURES, Arm, ArmResult, Measure
from trimtab.jobs.evaluate.variants import build_engine_config, evaluate_arms
from trimtab.jobs.judges.runner import apply_judge, open_judge
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version

# Sides of the prompts that a metric covers, of those that can be compared with the champion: True is the harmful side.
SIDES: Mapping[Measure, tuple[bool, ...]] = {"refusal": (True,), "compliance": (False,), "balanced": (True, False)}
MINE, THEIRS = "version", "champion"


def measure_prefix(
    config: PromoteConfig, base: BaseModel, rules: Sequence[PromotionRule], version: Version, champion: Version | None
) -> Mapping[PromotionRule, MeasuredMetrics]:
    """Measure the metrics of rules on sets of prompts.

    Args:
        config: configuration of the promotion.
        base: base model.
        rules: rules that name a set.
        version: version of a prefix.
        champion: current champion; None if there is none.

    Returns:
        For each rule, the metric of the version, and its difference to the champion's; None without a champion.

    Raises:
        UsageError: if a rule cannot be checked.
        TrimtabError: if the prefixes or the judge cannot be used, or the job fails.
    """
    for rule in rules:
        if _get_measure(rule) not in SIDES and rule.over_champion is not None:
            raise UsageError(f"rule on {rule.metric}: the metric supports at_least and at_most only, not against the champion")
    sets = {name: read_all_prompts([name], None, config.columns) for name in dict.fromkeys(rule.set or "" for rule in rules)}
    arms = [Arm(MINE, prefix=registry.load_prefix(version, base))]
    if champion is not None:
        arms.append(Arm(THEIRS, prefix=registry.load_prefix(champion, base)))
    judge = open_judge(config.judge, base, config.num_gpus)
    with ray_session(config.address):
        results = evaluate_arms(base, arms, sets, config.max_tokens, build_engine_config(config.dtype), config.num_gpus)
        results = apply_judge(results, judge, config.num_gpus)
    return {rule: _compute_metric(rule, results[rule.set or ""]) for rule in rules}


def _compute_metric(rule: PromotionRule, results: Sequence[ArmResult]) -> MeasuredMetrics:
    version, champion, measure = results[0], results[1:], _get_measure(rule)
    estimate = pool_over_seeds([version], measure)
    if not estimate.count:
        raise UsageError(f"rule on {rule.metric}: {rule.set} has no prompts that the metric applies to")
    sides = SIDES.get(measure)
    difference = estimate_difference([version], champion, sides=sides) if champion and sides else None
    return estimate, difference


def _get_measure(rule: PromotionRule) -> Measure:
    for measure in MEASURES:
        if measure == rule.metric:
            return measure
    raise UsageError(f"rule on {rule.metric}: not a metric of prefixes on a set. Use {', '.join(MEASURES)}")

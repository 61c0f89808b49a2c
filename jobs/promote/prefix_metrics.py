"""Figures for the gate of prefixes: the version and its champion answer the same prompts, in one engine."""

from collections.abc import Mapping, Sequence

from trimtab.data.readers import read_all
from trimtab.errors import UsageError
from trimtab.evaluation.promotion_rules import Found, Rule
from trimtab.evaluation.safety import comparison
from trimtab.evaluation.safety.comparison import Measure
from trimtab.evaluation.safety.results import Arm, ArmResult
from trimtab.jobs.evaluate import variants
from trimtab.jobs.judges.runner import opened, rejudged
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.runtime.cluster import joined
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version

# What a figure is about: True is the harmful side.
SIDES: dict[Measure, tuple[bool, ...]] = {"refusal": (True,), "compliance": (False,), "balanced": (True, False), "partial": ()}
MINE, THEIRS = "version", "champion"


def measured(
    config: PromoteConfig, base: BaseModel, rules: Sequence[Rule], version: Version, champion: Version | None
) -> Mapping[Rule, Found]:
    """What each rule's figure is, and how much more than the champion's. Raises UsageError for rules that cannot be checked."""
    for rule in rules:
        if _measure(rule) == "partial" and rule.over_champion is not None:
            raise UsageError("rule on partial: it is held against a bound only, not against the champion")
    sets = {name: read_all([name], None, config.columns) for name in dict.fromkeys(rule.set or "" for rule in rules)}
    chosen = [Arm(MINE, prefix=registry.load(version, base))]
    if champion is not None:
        chosen.append(Arm(THEIRS, prefix=registry.load(champion, base)))
    judge = opened(config.judge, base, config.gpus)
    with joined(config.address):
        results = variants.evaluate(base, chosen, sets, config.max_tokens, variants.engine(config.precision), config.gpus)
        results = rejudged(results, judge, config.gpus)
    return {rule: _figures(rule, results[rule.set or ""]) for rule in rules}


def _figures(rule: Rule, results: Sequence[ArmResult]) -> Found:
    mine, theirs, measure = results[0], results[1:], _measure(rule)
    found = comparison.over_seeds([mine], measure)
    if not found.count:
        raise UsageError(f"rule on {rule.metric}: {rule.set} has no prompts of that side")
    sides = SIDES[measure]
    more = comparison.difference([mine], theirs, sides=sides) if theirs and sides else None
    return found, more


def _measure(rule: Rule) -> Measure:
    for measure in SIDES:
        if measure == rule.metric:
            return measure
    raise UsageError(f"rule on {rule.metric}: a prefix has {', '.join(SIDES)} on a set")

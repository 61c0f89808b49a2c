"""`trimtab promote`: a version through the gate, on the record.

trimtab promote safety --config gate.yaml
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.errors import JobError, UsageError
from trimtab.evaluation import promotion_rules
from trimtab.evaluation.promotion_rules import Found, PromotionRule, RuleResult
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.promote.detector_metrics import measure_detector
from trimtab.jobs.promote.prefix_metrics import measure_prefix
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.stats.intervals import Interval
from trimtab.tracking import registry
from trimtab.tracking.promotions import promote_version, read_decision, record_decision
from trimtab.tracking.registry import Version


@dataclass(frozen=True)
class PromotionDecision:
    """What the gate says of a version, and why; `evidence` names the artifact of its run that holds the figures."""

    passed: bool
    said: str
    checked: Sequence[RuleResult] = ()
    evidence: str | None = None


def run_promote(config: PromoteConfig) -> dict[str, Any]:
    """Decide, write the decision on the version, and move `champion` where it passed. Raises JobError where it did not."""
    version = registry.find_version(config.base, config.name, config.version)
    champion = registry.find_champion(version.base, version.name)
    if champion is not None and champion.version == version.version:
        print_line(f"{config.base}:{config.name}: version {version.version} is champion already")
        return {"champion": version.version, "before": version.version, "passed": True, "forced": False, "rules": []}
    decision = decide_promotion(config, version, champion)
    if not decision.passed and not config.force:
        raise JobError(
            f"{config.name} version {version.version} is not promoted: {decision.said}; --force true promotes it nevertheless, "
            "on record"
        )
    forced = not decision.passed
    reason = "; ".join(part for part in (config.reason, decision.said) if part)
    promote_version(version, reason, decision.evidence, forced=forced)
    was = f" (was {champion.version})" if champion else ""
    print_line(f"{config.base}:{config.name}: champion is now version {version.version}{was}{', forced' if forced else ''}")
    return {
        "champion": version.version,
        "before": champion.version if champion else None,
        "passed": decision.passed,
        "forced": forced,
        "rules": promotion_rules.rule_result_as_json(decision.checked),
    }


def decide_promotion(config: PromoteConfig, version: Version, champion: Version | None) -> PromotionDecision:
    """The gate's decision, by the rules where there are some; they and what was found are kept with the version's run."""
    if not config.rules:
        return _as_made(version)
    base = resolve_base_model(config.base)
    checked = _check(config, base, version, champion)
    console.print(build_table(checked, version, champion))
    broken = [one for one in checked if not one.passed]
    said = f"breaks {_said(broken[0])}" if broken else f"keeps all {len(checked)} rules"
    evidence = {
        "version": asdict(version),
        "champion": asdict(champion) if champion else None,
        "at": time.time(),
        "passed": not broken,
        "rules": promotion_rules.rule_result_as_json(checked),
        "judge": asdict(config.judge) if version.kind == "prefix" else None,
    }
    return PromotionDecision(not broken, said, checked, record_decision(version, not broken, said, evidence))


def build_table(checked: Sequence[RuleResult], version: Version, champion: Version | None) -> Table:
    """Rules, and what was found."""
    over = f"over champion {champion.version}" if champion else "no champion yet"
    shown = Table("rule", f"version {version.version}", over, "", title=f"gate of {version.base}:{version.name}")
    for one in checked:
        shown.add_row(str(one.rule), str(one.found), str(one.more or "-"), "kept" if one.passed else "broken")
    return shown


def _check(config: PromoteConfig, base: BaseModel, version: Version, champion: Version | None) -> list[RuleResult]:
    on_card = [rule for rule in config.rules if rule.set is None]
    on_sets = [rule for rule in config.rules if rule.set is not None]
    figures: dict[PromotionRule, Found] = {rule: _of_card(rule, version, champion) for rule in on_card}
    if on_sets:
        measured = measure_detector if version.kind == "detector" else measure_prefix
        figures |= measured(config, base, on_sets, version, champion)
    return [promotion_rules.check_rule(rule, *figures[rule]) for rule in config.rules]


def _of_card(rule: PromotionRule, version: Version, champion: Version | None) -> Found:
    """A figure that was measured when a version was made. The champion's was on the same data only where the two runs were."""
    if rule.metric not in version.metrics:
        there = ", ".join(sorted(version.metrics)) or "none"
        raise UsageError(f"rule on {rule.metric}: version {version.version} has no such figure (it has {there}); name a set")
    mine = version.metrics[rule.metric]
    theirs = champion.metrics.get(rule.metric) if champion else None
    more = None if theirs is None else Interval(mine - theirs, mine - theirs, mine - theirs)
    return Interval(mine, mine, mine), more


def _as_made(version: Version) -> PromotionDecision:
    found = read_decision(version)
    if found is None:
        return PromotionDecision(False, "no gate has seen it: give rules, as --config gate.yaml")
    return PromotionDecision(found["passed"], found["said"], evidence=found["evidence"])


def _said(one: RuleResult) -> str:
    return f"{one.rule} ({one.found}{f', {one.more} over champion' if one.more else ''})"

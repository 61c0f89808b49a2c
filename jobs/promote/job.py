"""Job of `trimtab promote`: gate check and recorded promotion of a version.

trimtab promote safety --config gate.yaml
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.errors import JobError
from trimtab.evaluation import promotion_rules
from trimtab.evaluation.promotion_rules import MeasuredMetrics, PromotionRule, RuleResult
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.promote.detector_metrics import measure_detector
from trimtab.jobs.promote.prefix_metrics import measure_prefix
from trimtab.jobs.promote.recorded_metrics import read_card_metric
from trimtab.model.base_model import BaseModel, resolve_base_model
from trimtab.tracking import registry
from trimtab.tracking.promotions import promote_version, read_decision, record_decision
from trimtab.tracking.registry import Version


@dataclass(frozen=True)
class PromotionDecision:
    """Decision of the gate on a version.

    Attributes:
        passed: whether the version passes.
        reason: reason of the decision.
        checked: results of the rules.
        evidence: name of the artifact of the version's run that holds the metrics; None without metrics.
    """

    passed: bool
    reason: str
    checked: Sequence[RuleResult] = ()
    evidence: str | None = None

    @property
    def undecided(self) -> bool:
        """Whether no rule failed, but the recorded cases do not decide one."""
        failed = [result for result in self.checked if not result.passed]
        return bool(failed) and all(result.undecided for result in failed)


def run_promote(config: PromoteConfig) -> dict[str, Any]:
    """Check a version against the gate, record the decision, and promote the version if it passes.

    Returns:
        Decision and the champion before and after, for `--json`. The champion stays if the rules are not decided.

    Raises:
        JobError: if the version fails the gate and `force` is off.
    """
    version = registry.find_version(config.base, config.name, config.version)
    champion = registry.find_champion(version.base, version.name)
    if champion is not None and champion.version == version.version:
        print_line(f"{config.base}:{config.name}: version {version.version} is already champion")
        return {"champion": version.version, "before": version.version, "passed": True, "forced": False, "rules": []}
    decision = decide_promotion(config, version, champion)
    before = champion.version if champion else None
    if decision.undecided and not config.force:
        print_line(f"{config.base}:{config.name}: version {version.version} stays candidate; {decision.reason}")
        rules = promotion_rules.rule_result_as_json(decision.checked)
        return {"champion": before, "before": before, "passed": False, "forced": False, "rules": rules}
    if not decision.passed and not config.force:
        raise JobError(
            f"{config.name} version {version.version} is not promoted: {decision.reason}. "
            "Pass --force true to promote it anyway, which is recorded"
        )
    forced = not decision.passed
    reason = "; ".join(part for part in (config.reason, decision.reason) if part)
    promote_version(version, reason, decision.evidence, forced=forced)
    previous = f" (was {champion.version})" if champion else ""
    print_line(
        f"{config.base}:{config.name}: champion is now version {version.version}{previous}{', forced' if forced else ''}"
    )
    return {
        "champion": version.version,
        "before": before,
        "passed": decision.passed,
        "forced": forced,
        "rules": promotion_rules.rule_result_as_json(decision.checked),
    }


def decide_promotion(config: PromoteConfig, version: Version, champion: Version | None) -> PromotionDecision:
    """Decide if a version passes the gate.

    The configured rules decide, and their results are logged to the version's run. Without rules, the recorded decision of
    the job that created the version applies.

    Raises:
        UsageError: if a rule cannot be checked.
        TrimtabError: if a measurement fails.
    """
    if not config.rules:
        return _read_recorded_decision(version)
    base = resolve_base_model(config.base)
    checked = _check_rules(config, base, version, champion)
    console.print(build_table(checked, version, champion))
    failed = [result for result in checked if not result.passed]
    violated = [result for result in failed if result.undecided is None]
    if violated:
        reason = f"violates {_format_result(violated[0])}"
    else:
        reason = next((result.undecided for result in failed if result.undecided), f"passes all {len(checked)} rules")
    evidence = {
        "version": asdict(version),
        "champion": asdict(champion) if champion else None,
        "at": time.time(),
        "passed": not failed,
        "rules": promotion_rules.rule_result_as_json(checked),
        "judge": asdict(config.judge) if version.kind == "prefix" else None,
    }
    artifact = record_decision(version, not failed, reason, evidence)
    return PromotionDecision(not failed, reason, checked, artifact)


def build_table(checked: Sequence[RuleResult], version: Version, champion: Version | None) -> Table:
    """Build a table with one line per rule."""
    over = f"over champion {champion.version}" if champion else "no champion"
    table = Table("rule", f"version {version.version}", over, "", title=f"gate of {version.base}:{version.name}")
    for result in checked:
        table.add_row(str(result.rule), str(result.measured), str(result.improvement or "-"), result.outcome)
    return table


def _check_rules(config: PromoteConfig, base: BaseModel, version: Version, champion: Version | None) -> list[RuleResult]:
    on_card = [rule for rule in config.rules if rule.set is None]
    on_sets = [rule for rule in config.rules if rule.set is not None]
    metrics: dict[PromotionRule, MeasuredMetrics] = {rule: read_card_metric(rule, version, champion) for rule in on_card}
    if on_sets:
        measure = measure_detector if version.kind == "detector" else measure_prefix
        metrics |= measure(config, base, on_sets, version, champion)
    return [promotion_rules.check_rule(rule, *metrics[rule]) for rule in config.rules]


def _read_recorded_decision(version: Version) -> PromotionDecision:
    decision = read_decision(version)
    if decision is None:
        return PromotionDecision(False, "no gate has checked it; pass rules, as --config gate.yaml")
    return PromotionDecision(decision["passed"], decision["reason"], evidence=decision["evidence"])


def _format_result(result: RuleResult) -> str:
    return f"{result.rule} ({result.measured}{f', {result.improvement} over champion' if result.improvement else ''})"

"""Rules of the promotion gate, which a version must pass before it becomes champion.

By default a rule passes only if the whole 95 % interval satisfies its bounds. The point estimate alone is not enough, so a
small set that cannot resolve a difference does not let a version pass.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from trimtab.errors import UsageError
from trimtab.stats.intervals import Interval

# Metrics for which lower is better.
LOWER = ("partial", "fpr95", "aurc")


@dataclass(frozen=True)
class PromotionRule:
    """A bound on one metric of a version.

    Args:
        metric: for prefixes refusal, compliance, balanced or partial; for detectors auroc, auprc, fpr95 or aurc; without a
            set, any metric on the version's card.
        set: prompts for a prefix, a folder of signals for a detector; without a set, the metric on the card counts.
        at_least: lower bound.
        at_most: upper bound.
        over_champion: minimum improvement over the champion on the same set; a negative value is the largest allowed
            regression; passes if there is no champion yet.
        interval: require the whole 95 % interval to satisfy the bounds; false checks the point estimate only.
    """

    metric: str
    set: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    over_champion: float | None = None
    interval: bool = True

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None and self.over_champion is None:
            raise UsageError(f"rule on {self.metric}: give at_least, at_most or over_champion")

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "at most": self.at_most, "over champion by": self.over_champion}
        bounds = ", ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)
        return f"{self.metric} {bounds}{f' on {self.set}' if self.set else ''}"


# A version's metric, and its difference from the champion's; None without a champion.
MeasuredMetrics = tuple[Interval, Interval | None]


@dataclass(frozen=True)
class RuleResult:
    """Outcome of one rule.

    Attributes:
        rule: the rule that was checked.
        measured: metric of the version.
        improvement: difference from the champion's metric; None without a champion.
        passed: whether the version satisfies the rule.
    """

    rule: PromotionRule
    measured: Interval
    improvement: Interval | None
    passed: bool


def check_rule(rule: PromotionRule, measured: Interval, difference: Interval | None) -> RuleResult:
    """Check the metric of a version against a rule. A metric that is not finite never passes.

    Args:
        rule: the rule to check.
        measured: metric of the version.
        difference: metric of the version minus that of the champion; None without a champion.
    """
    low, high = (measured.low, measured.high) if rule.interval else (measured.value, measured.value)
    passed = isfinite(low) and isfinite(high)
    passed = passed and (rule.at_least is None or low >= rule.at_least) and (rule.at_most is None or high <= rule.at_most)
    if rule.over_champion is not None and difference is not None:
        sign = -1 if rule.metric in LOWER else 1
        ends = (difference.low, difference.high) if rule.interval else (difference.value, difference.value)
        improvement = min(sign * end for end in ends)
        passed = passed and isfinite(improvement) and improvement >= rule.over_champion
    return RuleResult(rule, measured, difference, passed)


def rule_result_as_json(results: Sequence[RuleResult]) -> list[dict[str, Any]]:
    """Convert rule results to JSON, as recorded in the evidence of a promotion."""
    return [asdict(result) for result in results]

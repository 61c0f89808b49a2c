"""Rules of the promotion gate, which a version must pass before it becomes champion.

By default a rule on a set, and every rule against the champion, passes only if the whole 95 % interval satisfies its bounds.
The point estimate alone is not enough, so a small set that cannot resolve a difference does not let a version pass. A rule
against the champion without a set is not decided while the interval contains the bound.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from trimtab.errors import UsageError
from trimtab.evaluation.gate import Gain, describe_undecided
from trimtab.stats.intervals import Interval, Rate

# Metrics for which lower is better.
LOWER = ("harmful_compliance", "partial", "degenerate", "fpr95", "aurc", "flipped")


@dataclass(frozen=True)
class PromotionRule:
    """A bound on one metric of a version.

    Args:
        metric: for prefixes refusal, compliance, balanced, harmful_compliance, partial or degenerate; for detectors auroc,
            auprc, fpr95 or aurc, and at the default threshold flagged (share of positives), passed (of negatives that are not
            flagged) or flipped (of rewrites by attacks that are not flagged although the original is); without a set, any
            metric on the version's card.
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
        undecided: why the recorded cases do not decide the rule; None if they do.
    """

    rule: PromotionRule
    measured: Interval
    improvement: Interval | None
    passed: bool
    undecided: str | None = None

    @property
    def outcome(self) -> str:
        """The outcome in one or two words."""
        return "passed" if self.passed else "failed" if self.undecided is None else "not decided"


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
    if rule.over_champion is None or difference is None:
        return RuleResult(rule, measured, difference, passed)
    sign = -1 if rule.metric.rpartition("_")[2] in LOWER else 1
    ends = (difference.low, difference.high) if rule.interval else (difference.value, difference.value)
    low, high = sorted(sign * end for end in ends)
    recorded = rule.set is None and rule.interval
    reached = isfinite(low) and (low > rule.over_champion if recorded else low >= rule.over_champion)
    if passed and not reached and recorded and not high <= rule.over_champion:
        improvement = Interval(sign * difference.value, low, high)
        return RuleResult(rule, measured, difference, False, _describe_undecided(rule, measured, improvement, difference))
    return RuleResult(rule, measured, difference, passed and reached)


def _describe_undecided(rule: PromotionRule, measured: Interval, improvement: Interval, difference: Interval) -> str:
    cases = difference.count if isinstance(difference, Rate) else 0
    if not cases or rule.over_champion is None:
        return "not decided: the runs of the version and of the champion recorded no cases in common. Name a set"
    gain = Gain(
        rule.metric, measured.value, "champion", measured.value - difference.value, improvement, cases, "recorded cases"
    )
    return describe_undecided(gain, rule.over_champion)


def rule_result_as_json(results: Sequence[RuleResult]) -> list[dict[str, Any]]:
    """Convert rule results to JSON, as recorded in the evidence of a promotion."""
    return [asdict(result) for result in results]

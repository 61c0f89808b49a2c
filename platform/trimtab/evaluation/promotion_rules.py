"""The gate: rules that a version has to keep before it may become champion (ours).

A rule holds where the whole 95 % interval keeps its bound, not only the figure: what a small set cannot tell does not pass.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from trimtab.errors import UsageError
from trimtab.stats.intervals import Interval

# Figures of which less is better.
LOWER = ("partial", "fpr95", "aurc")


@dataclass(frozen=True)
class PromotionRule:
    """What must hold of a version.

    Args:
        metric: of prefixes refusal, compliance, balanced or partial; of detectors auroc, auprc, fpr95 or aurc; without a set
            any figure of the version's card.
        set: prompts for a prefix, a folder of signals for a detector; without one, the card's figure counts.
        at_least: bound from below.
        at_most: bound from above.
        over_champion: how much better than the champion on the same set it must be, below 0 how much worse it may be; holds
            where there is no champion yet.
        interval: the whole 95 % interval must keep the bounds; false lets the figure alone do.
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
        bounds = {"at least": self.at_least, "at most": self.at_most, "over champion by": self.over_champion}
        said = ", ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
        return f"{self.metric} {said}{f' on {self.set}' if self.set else ''}"


# A version's figure, and how much more of it than the champion's it is; None where there is no champion.
Found = tuple[Interval, Interval | None]


@dataclass(frozen=True)
class RuleResult:
    """A rule and what was found."""

    rule: PromotionRule
    found: Interval
    more: Interval | None
    passed: bool


def check_rule(rule: PromotionRule, found: Interval, more: Interval | None) -> RuleResult:
    """Hold a version's figure against a rule. A figure that is no number keeps no bound."""
    low, high = (found.low, found.high) if rule.interval else (found.value, found.value)
    held = isfinite(low) and isfinite(high)
    held = held and (rule.at_least is None or low >= rule.at_least) and (rule.at_most is None or high <= rule.at_most)
    if rule.over_champion is not None and more is not None:
        sign = -1 if rule.metric in LOWER else 1
        ends = (more.low, more.high) if rule.interval else (more.value, more.value)
        better = min(sign * end for end in ends)
        held = held and isfinite(better) and better >= rule.over_champion
    return RuleResult(rule, found, more, held)


def rule_result_as_json(checked: Sequence[RuleResult]) -> list[dict[str, Any]]:
    """For evidence."""
    return [asdict(one) for one in checked]

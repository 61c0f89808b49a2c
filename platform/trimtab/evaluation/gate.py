"""Decision of the promotion gate on a version's gain over its best rival, with the paired interval of the gain."""

from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal

from trimtab.stats.intervals import Interval

GateRule = Literal["interval", "point"]
"""`interval` requires the whole 95 % interval of a gain to be above the bound, `point` the point estimate only."""

LARGE = 1_000_000


@dataclass(frozen=True)
class GateDecision:
    """Decision of the gate.

    Attributes:
        passed: whether the version may become champion.
        reason: explanation, with the figures.
        decided: whether the data suffice for a decision; if not, the version stays candidate.
    """

    passed: bool
    reason: str
    decided: bool = True


@dataclass(frozen=True)
class Gain:
    """Comparison of a version with its best rival on the same cases.

    Attributes:
        metric: name of the metric.
        value: metric of the version.
        rival: name of the rival.
        rival_value: metric of the rival.
        difference: `value` minus `rival_value`, with its paired interval.
        cases: number of cases.
        unit: plural of what the cases are, for example `prompts`.
    """

    metric: str
    value: float
    rival: str
    rival_value: float
    difference: Interval
    cases: int
    unit: str

    def __str__(self) -> str:
        d = self.difference
        interval = f" [{d.low:+.3f}, {d.high:+.3f}]" if isfinite(d.low) and isfinite(d.high) else ""
        return f"{self.metric} {self.value:.3f}, {d.value:+.3f}{interval} over {self.rival}"


def decide_on_gain(gain: Gain, bound: float, rule: GateRule) -> GateDecision:
    """Decide whether a gain exceeds its bound.

    Args:
        gain: comparison with the best rival.
        bound: value that the gain must exceed.
        rule: what must exceed the bound.

    Returns:
        The decision. With rule `interval`, a gain whose interval contains the bound is not decided.
    """
    difference = gain.difference
    low, high = (difference.value,) * 2 if rule == "point" else (difference.low, difference.high)
    if low > bound:
        by_point = " (by point estimate)" if rule == "point" else ""
        return GateDecision(True, f"{gain}{by_point}; promoted to champion")
    if high <= bound or not isfinite(difference.value):
        figures = f"{gain.metric} {gain.value:.3f} is not above {gain.rival} ({gain.rival_value:.3f}) by {bound:.3f}"
        return GateDecision(False, figures)
    return GateDecision(False, describe_undecided(gain, bound), decided=False)


def describe_undecided(gain: Gain, bound: float) -> str:
    """Describe a gain whose interval contains its bound, with the number of cases that would decide.

    Args:
        gain: comparison with the best rival.
        bound: value that the gain must exceed.
    """
    missing = estimate_missing_cases(gain, bound)
    more = f"more than {LARGE:,}" if missing is None else f"about {missing:,}"
    return f"not decided: {more} more {gain.unit} needed; {gain}"


def estimate_missing_cases(gain: Gain, bound: float) -> int | None:
    """Estimate how many more cases decide whether a gain exceeds its bound, if its point estimate stays the same.

    The width of the interval falls with the square root of the number of cases.

    Args:
        gain: comparison with the best rival.
        bound: value that the gain must exceed.

    Returns:
        Number of further cases; None if it is above `LARGE`, or if there is no interval.
    """
    value, low, high = gain.difference.value, gain.difference.low, gain.difference.high
    half = value - low if value > bound else high - value
    margin = abs(value - bound)
    if not isfinite(half) or gain.cases * half**2 >= LARGE * margin**2:
        return None
    return max(1, ceil(gain.cases * (half / margin) ** 2) - gain.cases)

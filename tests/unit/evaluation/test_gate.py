"""The promotion gate: gains that are decided by their interval or by their point estimate, and those that are not decided."""

import math

import pytest

from trimtab.evaluation.gate import Gain, decide_on_gain, estimate_missing_cases
from trimtab.stats.intervals import Interval

NAN = math.nan


def make_gain(value, low, high, cases=100):
    return Gain("balanced", 0.8, "base", 0.8 - value, Interval(value, low, high), cases, "validation prompts")


@pytest.mark.parametrize(
    ("interval", "bound", "rule", "passed", "decided"),
    [
        ((0.1, 0.02, 0.18), 0.0, "interval", True, True),
        ((0.1, -0.02, 0.22), 0.0, "interval", False, False),
        ((0.1, 0.02, 0.18), 0.02, "interval", False, False),
        ((-0.1, -0.18, -0.02), 0.0, "interval", False, True),
        ((-0.1, -0.22, 0.02), 0.0, "interval", False, False),
        ((0.1, 0.02, 0.18), 0.2, "interval", False, True),
        ((0.0, 0.0, 0.0), 0.0, "interval", False, True),
        ((0.1, -0.02, 0.22), 0.0, "point", True, True),
        ((-0.1, -0.22, 0.02), 0.0, "point", False, True),
        ((0.0, -0.1, 0.1), 0.0, "point", False, True),
        ((NAN, NAN, NAN), 0.0, "interval", False, True),
        ((NAN, NAN, NAN), 0.0, "point", False, True),
        ((0.1, NAN, NAN), 0.0, "interval", False, False),
        ((0.1, NAN, NAN), 0.0, "point", True, True),
    ],
)
def test_rule_decides(interval, bound, rule, passed, decided):
    decision = decide_on_gain(make_gain(*interval), bound, rule)
    assert (decision.passed, decision.decided) == (passed, decided)
    assert decision.reason.startswith("not decided: ") == (not decided)
    assert decision.reason.endswith("promoted to champion") == passed


def test_reason_has_figures_and_the_number_of_missing_cases():
    reason = decide_on_gain(make_gain(0.1, -0.1, 0.3), 0.0, "interval").reason
    # The half width falls from 0.2 to 0.1 with four times as many prompts.
    assert reason == "not decided: about 300 more validation prompts needed; balanced 0.800, +0.100 [-0.100, +0.300] over base"
    reason = decide_on_gain(make_gain(0.0, -0.1, 0.1), 0.0, "interval").reason
    assert reason.startswith("not decided: more than 1,000,000 more validation prompts needed")
    assert decide_on_gain(make_gain(-0.1, -0.2, -0.05), 0.0, "interval").reason == (
        "balanced 0.800 is not above base (0.900) by 0.000"
    )
    assert "(by point estimate)" in decide_on_gain(make_gain(0.1, -0.1, 0.3), 0.0, "point").reason


def test_missing_cases_fall_with_the_distance_from_the_bound():
    assert estimate_missing_cases(make_gain(0.1, -0.1, 0.3), 0.0) == 300
    assert estimate_missing_cases(make_gain(0.1, -0.1, 0.3), 0.05) == 1500
    assert estimate_missing_cases(make_gain(-0.1, -0.3, 0.1), 0.0) == 300, "enough to decide that it is no gain"
    assert estimate_missing_cases(make_gain(0.1, NAN, NAN), 0.0) is None

"""Rules of the promotion gate: bounds on intervals and points, regressions, and values that are not finite."""

from dataclasses import replace
from math import inf, nan

import pytest

from trimtab.errors import UsageError
from trimtab.evaluation.promotion_rules import PromotionRule, check_rule, rule_result_as_json
from trimtab.stats.intervals import Interval, Rate

GOOD, WIDE = Interval(0.8, 0.7, 0.9), Interval(0.4, 0.3, 0.6)
GAIN, UNCERTAIN, LOSS = Interval(0.2, 0.1, 0.3), Interval(0.1, -0.01, 0.2), Interval(-0.2, -0.3, -0.1)


@pytest.mark.parametrize(
    ("rule", "measured", "passed"),
    [
        (PromotionRule("auroc", at_least=0.7), GOOD, True),
        (PromotionRule("auroc", at_least=0.71), GOOD, False),
        (PromotionRule("auroc", at_least=0.7), Interval(0.8, 0.71, 0.9), True),
        (PromotionRule("auroc", at_least=0.7), Interval(0.8, 0.69, 0.9), False),
        (PromotionRule("auroc", at_least=0.7, interval=False), Interval(0.8, 0.69, 0.9), True),
        (PromotionRule("fpr95", at_most=0.5), WIDE, False),
        (PromotionRule("auroc", at_least=0.71, interval=False), GOOD, True),
        (PromotionRule("auroc", at_least=0.8, interval=False), GOOD, True),
        (PromotionRule("auroc", at_least=0.81, interval=False), GOOD, False),
        (PromotionRule("fpr95", at_most=0.6), WIDE, True),
        (PromotionRule("fpr95", at_most=0.59), WIDE, False),
        (PromotionRule("fpr95", at_most=0.4, interval=False), WIDE, True),
        (PromotionRule("fpr95", at_most=0.39, interval=False), WIDE, False),
        (PromotionRule("auroc", at_least=0.3, at_most=0.5), WIDE, False),
        (PromotionRule("auroc", at_least=0.35, at_most=0.7), WIDE, False),
        (PromotionRule("auroc", at_least=0.3, at_most=0.6), WIDE, True),
        (PromotionRule("auroc", at_least=0.0), Interval(nan, nan, nan), False),
        (PromotionRule("auroc", at_most=1.0), Interval(0.5, -inf, 0.6), False),
        (PromotionRule("auroc", at_least=0.0), Interval(0.5, 0.4, inf), False),
        (PromotionRule("auroc", over_champion=0.0), Interval(nan, nan, nan), False),
    ],
)
def test_bounds_hold_for_the_whole_interval_or_the_point(rule, measured, passed):
    assert check_rule(rule, measured, None).passed is passed


@pytest.mark.parametrize(
    ("rule", "difference", "passed"),
    [
        (PromotionRule("auroc", over_champion=0.0), None, True),
        (PromotionRule("auroc", over_champion=0.5), None, True),
        (PromotionRule("fpr95", over_champion=0.05), LOSS, True),
        (PromotionRule("fpr95", over_champion=0.05), Interval(-0.2, -0.3, 0.0), False),
        (PromotionRule("auroc", over_champion=0.1), GAIN, True),
        (PromotionRule("auroc", over_champion=0.11), GAIN, False),
        (PromotionRule("auroc", over_champion=0.2, interval=False), GAIN, True),
        (PromotionRule("auroc", over_champion=0.21, interval=False), GAIN, False),
        (PromotionRule("auroc", over_champion=0.0), UNCERTAIN, False),
        (PromotionRule("auroc", over_champion=-0.02), UNCERTAIN, True),
        (PromotionRule("balanced", over_champion=0.0), LOSS, False),
        *((PromotionRule(metric, over_champion=0.1), LOSS, True) for metric in ("partial", "fpr95", "aurc")),
        *((PromotionRule(metric, over_champion=0.11), LOSS, False) for metric in ("partial", "fpr95", "aurc")),
        (PromotionRule("fpr95", over_champion=0.0), GAIN, False),
        (PromotionRule("auroc", over_champion=-1.0), Interval(nan, nan, nan), False),
        (PromotionRule("auroc", over_champion=-1.0), Interval(0.1, 0.0, inf), True),
        (PromotionRule("auroc", over_champion=-1.0), Interval(0.1, -inf, 0.2), False),
        (PromotionRule("fpr95", over_champion=-1.0), Interval(inf, inf, inf), False),
    ],
)
def test_improvement_over_the_champion(rule, difference, passed):
    """Lower is better for partial, fpr95 and aurc. Without a champion the rule passes."""
    rule = replace(rule, set="x")
    result = check_rule(rule, GOOD, difference)
    assert result.passed is passed
    assert result.outcome == ("passed" if passed else "failed")
    assert (result.rule, result.measured, result.improvement) == (rule, GOOD, difference)


def test_all_bounds_of_a_rule_must_hold():
    assert not check_rule(PromotionRule("auroc", "x", at_least=0.75, over_champion=0.1), GOOD, GAIN).passed
    assert not check_rule(PromotionRule("auroc", "x", at_least=0.7, over_champion=0.2), GOOD, GAIN).passed
    assert check_rule(PromotionRule("auroc", "x", at_least=0.7, over_champion=0.1), GOOD, GAIN).passed


@pytest.mark.parametrize(
    ("rule", "difference", "outcome"),
    [
        (PromotionRule("test_auroc", over_champion=0.0), Rate(0.2, 0.1, 0.3, 50), "passed"),
        (PromotionRule("test_auroc", over_champion=0.0), Rate(0.2, 0.0, 0.3, 50), "not decided"),
        (PromotionRule("test_auroc", over_champion=0.0), Rate(-0.2, -0.3, -0.1, 50), "failed"),
        (PromotionRule("test_auroc", over_champion=0.0), Rate(0.0, 0.0, 0.0, 50), "failed"),
        (PromotionRule("test_auroc", over_champion=0.0), Rate(0.1, nan, nan, 0), "not decided"),
        (PromotionRule("test_auroc", over_champion=0.0, interval=False), Rate(0.1, nan, nan, 0), "passed"),
        (PromotionRule("test_auroc", over_champion=0.0, at_least=0.9), Rate(0.1, nan, nan, 0), "failed"),
        (PromotionRule("test_fpr95", over_champion=0.0), Rate(-0.2, -0.3, -0.1, 50), "passed"),
        (PromotionRule("test_fpr95", over_champion=0.0), Rate(0.2, 0.1, 0.3, 50), "failed"),
    ],
)
def test_rule_without_a_set_is_not_decided_while_the_interval_contains_its_bound(rule, difference, outcome):
    result = check_rule(rule, Interval(0.8, 0.8, 0.8), difference)
    assert result.outcome == outcome
    assert result.passed == (outcome == "passed")
    assert (result.undecided is None) == (outcome != "not decided")


def test_undecided_rule_names_the_missing_cases():
    result = check_rule(PromotionRule("test_auroc", over_champion=0.0), GOOD, Rate(0.1, -0.1, 0.3, 50))
    assert result.undecided.startswith("not decided: about 150 more recorded cases needed; test_auroc 0.800, +0.100")
    result = check_rule(PromotionRule("test_fpr95", over_champion=0.0), GOOD, Rate(-0.1, -0.3, 0.1, 50))
    assert result.undecided.startswith("not decided: about 150 more recorded cases needed; test_fpr95 0.800, +0.100")
    assert (
        "no cases in common"
        in check_rule(PromotionRule("test_auroc", over_champion=0.0), GOOD, Rate(0.1, nan, nan, 0)).undecided
    )


def test_rejects_rule_without_limit():
    with pytest.raises(UsageError, match="rule on auroc: give at_least, at_most or over_champion"):
        PromotionRule("auroc", set="x")
    for bound in ("at_least", "at_most", "over_champion"):
        assert getattr(PromotionRule("auroc", **{bound: 0.0}), bound) == 0


def test_rule_is_described_by_its_bounds():
    assert str(PromotionRule("auroc", at_least=0.7)) == "auroc at least 0.7"
    rule = PromotionRule("fpr95", "answers", at_most=0.5, over_champion=-0.02)
    assert str(rule) == "fpr95 at most 0.5, over champion by -0.02 on answers"


def test_rules_require_the_whole_interval_by_default():
    assert PromotionRule("auroc", at_least=0.5).interval is True


def test_results_are_recorded_as_json():
    (entry,) = rule_result_as_json([check_rule(PromotionRule("auroc", at_least=0.7), GOOD, None)])
    assert entry["measured"] == {"value": 0.8, "low": 0.7, "high": 0.9}
    assert (entry["passed"], entry["improvement"], entry["rule"]["metric"]) == (True, None, "auroc")

"""Figures over seeds, and of one arm against another."""

from dataclasses import replace

import pytest

from tests.support.safety_arms import arm
from trimtab.errors import UsageError
from trimtab.evaluation.safety.comparison import estimate_difference, pool_arms, pool_over_seeds
from trimtab.stats.intervals import compute_wilson_interval


def test_one_seed_gives_about_the_plain_interval():
    one = arm("sta#1", 20, 33)
    rate = pool_over_seeds([one])
    assert rate.value == pytest.approx(one.balanced.value)
    assert (rate.low, rate.high) == (pytest.approx(one.balanced.low, abs=0.02), pytest.approx(one.balanced.high, abs=0.02))
    assert rate.count == 70
    pooled = pool_arms([one])[0]
    assert (pooled.name, pooled.balanced, pooled.refusal) == ("sta", one.balanced, one.refusal)


def test_identical_seeds_tell_no_more_than_one():
    seeds = [arm(f"sta#{i}", 20, 33) for i in range(4)]
    one, four = pool_over_seeds(seeds[:1]), pool_over_seeds(seeds)
    assert four.value == pytest.approx(one.value)
    assert (four.low, four.high) == (pytest.approx(one.low, abs=0.02), pytest.approx(one.high, abs=0.02))


def test_seeds_that_differ_widen_the_interval():
    """One seed right on every prompt and one on none: one of the two is picked each time, so it is all or nothing."""
    rate = pool_over_seeds([arm("sta#1", 30, 40), arm("sta#2", 0, 0)])
    assert (rate.value, rate.low, rate.high) == (0.5, 0.0, 1.0)
    alike = pool_over_seeds([arm(f"sta#{i}", 20, 30) for i in range(3)], "refusal")
    apart = pool_over_seeds([arm(f"sta#{i}", 12 + 8 * i, 30) for i in range(3)], "refusal")
    assert alike.value == pytest.approx(apart.value)
    assert apart.high - apart.low > alike.high - alike.low


def test_all_right_in_every_seed_is_still_in_doubt():
    rate = pool_over_seeds([arm(f"sta#{i}", 30, 40) for i in range(3)], "refusal")
    assert rate == compute_wilson_interval(30, 30)


@pytest.mark.parametrize(("harmful", "benign"), [(0, 40), (30, 40), (0, 20), (1, 39)])
def test_seeds_that_agree_are_as_much_in_doubt_as_one(harmful, benign):
    seeds = [arm(f"sta#{i}", harmful, benign) for i in range(3)]
    rate, one = pool_over_seeds(seeds), seeds[0].balanced
    assert (rate.value, rate.count) == (one.value, 70)
    assert rate.low <= one.low < one.high <= rate.high
    assert (rate.low, rate.high) == (pytest.approx(one.low, abs=0.02), pytest.approx(one.high, abs=0.02))


def test_seeds_must_have_answered_the_same_prompts():
    one, other = arm("sta#1", 20, 33), arm("sta#2", 20, 33)
    with pytest.raises(UsageError, match="different prompts"):
        pool_over_seeds([one, replace(other, answers=other.answers[::-1])])
    with pytest.raises(UsageError, match="without its answers"):
        pool_over_seeds([replace(one, answers=[]), replace(other, answers=[])])
    with pytest.raises(UsageError, match="no seeds"):
        pool_over_seeds([])


def test_an_arm_against_another_is_paired_over_prompts():
    one, other = arm("sta#1", 20, 33), arm("sta#2", 24, 31)
    same = estimate_difference([one], [one])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert estimate_difference([arm("a", 30, 40)], [arm("b", 0, 0)]).low == 1
    base = arm("base", 1, 40)
    paired = estimate_difference([one, other], [base])
    expected = (
        pool_over_seeds([one, other]).value - base.balanced.value,
        pytest.approx(0.5 * (22 / 30 - 1 / 30 + 32 / 40 - 1)),
    )
    assert paired.value == pytest.approx(expected[0]) == expected[1]
    # What both got right and both got wrong says nothing of their difference.
    near = estimate_difference([arm("a", 20, 33)], [arm("b", 21, 33)])
    alone = arm("a", 20, 33).balanced
    assert near.low <= near.value <= near.high
    assert near.high - near.low < (alone.high - alone.low) / 2

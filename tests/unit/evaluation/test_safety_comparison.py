"""Rates of safety arms pooled over seeds, and paired differences of arms."""

from dataclasses import replace

import pytest

from tests.support.safety_arms import make_arm_results
from trimtab.errors import UsageError
from trimtab.evaluation.safety.comparison import estimate_difference, pool_arms, pool_over_seeds
from trimtab.stats.intervals import compute_wilson_interval


def test_interval_of_one_seed_is_close_to_unpooled_interval():
    results = make_arm_results("sta#1", 20, 33)
    rate = pool_over_seeds([results])
    balanced = results.balanced
    assert rate.value == pytest.approx(balanced.value)
    assert (rate.low, rate.high) == (pytest.approx(balanced.low, abs=0.02), pytest.approx(balanced.high, abs=0.02))
    assert rate.count == 70
    pooled = pool_arms([results])[0]
    assert (pooled.name, pooled.balanced, pooled.refusal) == ("sta", balanced, results.refusal)


def test_identical_seeds_do_not_narrow_the_interval():
    seeds = [make_arm_results(f"sta#{i}", 20, 33) for i in range(4)]
    one_seed, four_seeds = pool_over_seeds(seeds[:1]), pool_over_seeds(seeds)
    assert four_seeds.value == pytest.approx(one_seed.value)
    assert (four_seeds.low, four_seeds.high) == (
        pytest.approx(one_seed.low, abs=0.02),
        pytest.approx(one_seed.high, abs=0.02),
    )


def test_different_seeds_widen_the_interval():
    """One seed is right on every prompt and the other on none, so that resampled rates reach 0 and 1."""
    rate = pool_over_seeds([make_arm_results("sta#1", 30, 40), make_arm_results("sta#2", 0, 0)])
    assert (rate.value, rate.low, rate.high) == (0.5, 0.0, 1.0)
    equal = pool_over_seeds([make_arm_results(f"sta#{i}", 20, 30) for i in range(3)], "refusal")
    different = pool_over_seeds([make_arm_results(f"sta#{i}", 12 + 8 * i, 30) for i in range(3)], "refusal")
    assert equal.value == pytest.approx(different.value)
    assert different.high - different.low > equal.high - equal.low


def test_perfect_rate_in_every_seed_keeps_wilson_interval():
    rate = pool_over_seeds([make_arm_results(f"sta#{i}", 30, 40) for i in range(3)], "refusal")
    assert rate == compute_wilson_interval(30, 30)


@pytest.mark.parametrize(("harmful", "benign"), [(0, 40), (30, 40), (0, 20), (1, 39)])
def test_identical_seeds_keep_the_interval_of_one(harmful, benign):
    seeds = [make_arm_results(f"sta#{i}", harmful, benign) for i in range(3)]
    pooled, single = pool_over_seeds(seeds), seeds[0].balanced
    assert (pooled.value, pooled.count) == (single.value, 70)
    assert pooled.low <= single.low < single.high <= pooled.high
    assert (pooled.low, pooled.high) == (pytest.approx(single.low, abs=0.02), pytest.approx(single.high, abs=0.02))


def test_rejects_seeds_with_different_prompts():
    first, second = make_arm_results("sta#1", 20, 33), make_arm_results("sta#2", 20, 33)
    with pytest.raises(UsageError, match="different prompts"):
        pool_over_seeds([first, replace(second, answers=second.answers[::-1])])
    with pytest.raises(UsageError, match="without its answers"):
        pool_over_seeds([replace(first, answers=[]), replace(second, answers=[])])
    with pytest.raises(UsageError, match="no seeds"):
        pool_over_seeds([])


def test_difference_of_equal_and_of_opposite_arms():
    results = make_arm_results("sta#1", 20, 33)
    difference = estimate_difference([results], [results])
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert estimate_difference([make_arm_results("a", 30, 40)], [make_arm_results("b", 0, 0)]).low == 1


def test_difference_is_that_of_pooled_rates():
    seeds, base = [make_arm_results("sta#1", 20, 33), make_arm_results("sta#2", 24, 31)], make_arm_results("base", 1, 40)
    difference = estimate_difference(seeds, [base])
    assert difference.value == pytest.approx(pool_over_seeds(seeds).value - base.balanced.value)
    assert difference.value == pytest.approx(0.5 * (22 / 30 - 1 / 30 + 32 / 40 - 1))


def test_difference_is_paired_over_prompts():
    """Prompts that both arms answer right or both wrong do not widen the interval."""
    first, second = make_arm_results("a", 20, 33), make_arm_results("b", 21, 33)
    difference, single = estimate_difference([first], [second]), first.balanced
    assert difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < (single.high - single.low) / 2

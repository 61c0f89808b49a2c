"""Detector metrics pooled over seeds: values by hand, agreement with scikit-learn, coverage of intervals, and curves."""

import numpy as np
import pytest
from sklearn import metrics

from tests.support.factories import compute_metric
from trimtab.evaluation.detection.curves import GRID, compute_coverage, compute_curves, compute_roc
from trimtab.evaluation.detection.metrics import METRICS, compute_auroc, compute_risk_coverage
from trimtab.evaluation.detection.pooling import (
    DetectorResult,
    Resamples,
    SeedRisks,
    draw_resamples,
    estimate_difference,
    estimate_metric,
    measure_by_kind,
    measure_result,
)


def compute_reference_fpr95(made_up, risk):
    false_positive_rates, true_positive_rates, _ = metrics.roc_curve(made_up, risk, drop_intermediate=False)
    return false_positive_rates[true_positive_rates >= 0.95].min()


# Independent computations of the same metrics.
REFERENCES = {
    "auroc": metrics.roc_auc_score,
    "auprc": metrics.average_precision_score,
    "fpr95": compute_reference_fpr95,
    "aurc": lambda made_up, risk: compute_risk_coverage(risk, made_up)[1].mean(),
}


def compute_bootstrap_width(seed_risks):
    """Compute the width of the percentile interval of AUROC, with answers drawn with replacement within each class."""
    generator = np.random.default_rng(0)
    times = np.zeros((1000, len(seed_risks.risk)), dtype=int)
    for rows in (np.flatnonzero(seed_risks.made_up), np.flatnonzero(~seed_risks.made_up)):
        times[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 1000)
    low, high = np.quantile(compute_auroc(seed_risks.risk, seed_risks.made_up, times), [0.025, 0.975])
    return high - low


def make_risks(risk, made_up, seed=0, rows=None):
    risk = np.array(risk, dtype=float)
    rows = np.arange(len(risk)) if rows is None else np.array(rows)
    return SeedRisks(seed, rows, risk, risk, np.array(made_up, dtype=bool))


def make_noisy_risks(count, seed, strength, rows=None):
    """Make risks of alternating made-up and right answers. `strength` separates the classes, against standard normal noise."""
    made_up = np.arange(count) % 2 == 0
    noise = np.random.default_rng(seed).normal(size=count)
    rows = np.arange(count) if rows is None else rows
    return make_risks(1 / (1 + np.exp(-(strength * made_up[rows] + noise[rows]))), made_up[rows], seed, rows)


def make_questions(count):
    return [f"Question {i}?" for i in range(count)]


@pytest.mark.parametrize("name", METRICS)
def test_metric_with_counts_equals_metric_of_repeated_answers(name):
    """The risks have ties."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        risk = generator.integers(1, 8, 20) / 8
        made_up = np.arange(20) < 9
        times = generator.integers(0, 4, (1, 20))
        times[0, [0, 19]] = 1
        repeated = np.repeat(np.arange(20), times[0])
        expected = REFERENCES[name](made_up[repeated], risk[repeated])
        assert METRICS[name](risk, made_up, times)[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_metric_of_resample_without_a_class_is_nan(name):
    times = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    values = METRICS[name](np.array([0.1, 0.9, 0.3, 0.4]), np.array([True, True, False, False]), times)
    assert np.isnan(values).tolist() == [True, True, False]


def test_paired_difference_by_hand():
    """Of four pairs, `first` orders all right and `second` three. The two resamples are every answer once, and only the
    wrong pair of `second`."""
    first, second = make_risks([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]), make_risks([0.9, 0.2, 0.3, 0.1], [1, 1, 0, 0])
    resamples = Resamples(
        np.array([[1, 1, 1, 1], [0, 2, 2, 0]], dtype=np.uint8), np.arange(4), np.zeros((2, 1), dtype=np.int64)
    )
    results = [DetectorResult(name, {}, [test], 0.5, 0.5) for name, test in (("first", first), ("second", second))]
    difference = estimate_difference(*results, resamples)
    assert difference.auroc.value == pytest.approx(0.25)
    # The two resamples have the differences 0.25 and 1, and percentiles interpolate between them.
    assert difference.auroc.low == pytest.approx(0.25 + 0.025 * 0.75)
    assert difference.auroc.high == pytest.approx(0.25 + 0.975 * 0.75)
    assert difference.beats


def test_difference_of_a_detector_from_itself_is_zero():
    result = DetectorResult("a", {}, [make_noisy_risks(100, seed, 1) for seed in range(3)], 0.5, 0.5)
    difference = estimate_difference(result, result, draw_resamples(make_questions(100), 3))
    assert (difference.auroc.value, difference.auroc.low, difference.auroc.high, difference.beats) == (0, 0, 0, False)


def test_rejects_difference_over_different_answers():
    result = DetectorResult("a", {}, [make_noisy_risks(100, seed, 1) for seed in range(3)], 0.5, 0.5)
    other = DetectorResult("b", {}, [make_noisy_risks(100, seed, 1, np.arange(50)) for seed in range(3)], 0.5, 0.5)
    with pytest.raises(ValueError, match="different answers"):
        estimate_difference(result, other, draw_resamples(make_questions(100), 3))


def test_paired_interval_is_narrower_than_single_intervals():
    """The choice of questions changes both detectors alike, so that it hardly changes their difference."""
    strong, weak = ([make_noisy_risks(300, 7, strength) for _ in range(3)] for strength in (1.5, 1.2))
    resamples = draw_resamples(make_questions(300), 3)
    single = estimate_metric(compute_auroc, strong, resamples)
    paired = estimate_difference(DetectorResult("s", {}, strong, 0, 0), DetectorResult("w", {}, weak, 0, 0), resamples)
    assert paired.beats
    assert paired.auroc.high - paired.auroc.low < (single.high - single.low) / 2


def test_equal_seeds_do_not_narrow_the_interval():
    risks = make_noisy_risks(200, 1, 1)
    one_seed = estimate_metric(compute_auroc, [risks], draw_resamples(make_questions(200), 1))
    five_seeds = estimate_metric(compute_auroc, [risks] * 5, draw_resamples(make_questions(200), 5))
    assert five_seeds.high - five_seeds.low == pytest.approx(one_seed.high - one_seed.low, rel=0.1)
    assert one_seed.high - one_seed.low == pytest.approx(compute_bootstrap_width(risks), rel=0.15)


def test_interval_contains_its_value_and_narrows_with_more_answers():
    few, many = (
        estimate_metric(compute_auroc, [make_noisy_risks(count, 1, 1)], draw_resamples(make_questions(count), 1))
        for count in (40, 1000)
    )
    for interval in (few, many):
        assert interval.low <= interval.value <= interval.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_different_seeds_widen_the_interval():
    resamples = draw_resamples(make_questions(200), 4)
    equal = estimate_metric(compute_auroc, [make_noisy_risks(200, 1, 1)] * 4, resamples)
    different = estimate_metric(compute_auroc, [make_noisy_risks(200, 1, strength) for strength in (0, 0.6, 1.4, 2)], resamples)
    assert different.high - different.low > 1.5 * (equal.high - equal.low)


def test_answers_to_one_question_are_drawn_together():
    resamples = draw_resamples(["who", "who", "where", "when"], 2)
    times = resamples.get_counts(np.arange(4))
    assert np.array_equal(times[:, 0], times[:, 1])
    assert resamples.times.shape[1] == 3
    assert (resamples.times.sum(1) == 3).all()


def test_intervals_have_nominal_coverage():
    """The AUROC of unit normals at distance 1 is Phi(1 / sqrt 2) = 0.7602. At least 53 of 60 intervals must contain it, each
    for a data set of 300 questions and three seeds."""
    covered = 0
    for repeat in range(60):
        generator = np.random.default_rng(repeat)
        made_up = generator.random(300) < 0.5
        score = made_up + generator.normal(size=300)
        tests = []
        for seed in range(3):
            rows = np.flatnonzero(generator.random(300) < 0.4)
            tests.append(make_risks(1 / (1 + np.exp(-score[rows])), made_up[rows], seed, rows))
        interval = estimate_metric(compute_auroc, tests, draw_resamples(make_questions(300), 3, count=300))
        covered += interval.low <= 0.7602 <= interval.high
    assert covered >= 53


def test_source_needs_enough_answers_for_its_own_metric():
    test = make_noisy_risks(100, 0, 6)
    sources = np.array(["easy"] * 60 + ["few"] * 12 + ["hard"] * 28)
    hard = sources == "hard"
    risk = np.where(hard, 0.5, test.risk)
    results = measure_by_kind([make_risks(risk, test.made_up)], sources, draw_resamples(make_questions(100), 1))
    assert [(result.source, result.count, result.made_up) for result in results] == [
        ("easy", 60, 30),
        ("hard", 28, 14),
        ("few", 12, 6),
    ]
    assert results[0].auroc.value > 0.99
    assert results[1].auroc.value == 0.5
    assert np.isnan(results[2].auroc.value)


def test_counts_each_answer_once_over_seeds():
    result = measure_result([make_noisy_risks(40, seed, 1) for seed in range(3)], draw_resamples(make_questions(40), 3))
    assert (result.count, result.made_up) == (40, 20)


def test_curves_by_hand():
    """By falling risk the answers are made up, right, made up, right."""
    risk, made_up = np.array([0.9, 0.6, 0.4, 0.1]), np.array([True, False, True, False])
    roc = compute_roc(risk, made_up)
    # Half of the made-up answers are caught without a false positive, all with one of two, and the curve between is linear.
    assert roc[[0, 25, 50, 100]].tolist() == pytest.approx([0.5, 0.75, 1, 1])
    coverage = compute_coverage(risk, made_up)
    assert coverage[[25, 50, 75, 100]].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    constant = compute_roc(np.full(4, 0.3), made_up)
    assert constant.tolist() == pytest.approx(GRID.tolist())


def test_area_under_roc_curve_is_auroc():
    test = make_noisy_risks(2000, 3, 1)
    area = np.trapezoid(compute_roc(test.risk, test.made_up), GRID)
    assert area == pytest.approx(compute_metric(compute_auroc, test.risk, test.made_up), abs=0.005)


def test_reliability_bins_over_seeds_by_hand():
    tests = [make_risks([0.05, 0.15, 0.95], [0, 1, 1]), make_risks([0.05, 0.15, 0.95], [1, 0, 1], 1)]
    bins = compute_curves("a", tests).after
    assert [(round(entry.risk, 2), entry.frequency, entry.count) for entry in bins] == [
        (0.05, 0.5, 2),
        (0.15, 0.5, 2),
        (0.95, 1.0, 2),
    ]

"""Figures of detectors over seeds: worked by hand, equal to the plain ones, with intervals that claim no more than they may."""

import numpy as np
import pytest
from sklearn import metrics

from tests.support.factories import plain
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


def fpr95(made_up, risk):
    false, caught, _ = metrics.roc_curve(made_up, risk, drop_intermediate=False)
    return false[caught >= 0.95].min()


# What others make of the same, or we in another way.
PLAIN = {
    "auroc": metrics.roc_auc_score,
    "auprc": metrics.average_precision_score,
    "fpr95": fpr95,
    "aurc": lambda made_up, risk: compute_risk_coverage(risk, made_up)[1].mean(),
}


def bootstrapped(one):
    """The width of an AUROC's percentile interval over answers drawn with replacement, each class by itself."""
    generator = np.random.default_rng(0)
    times = np.zeros((1000, len(one.risk)), dtype=int)
    for side in (np.flatnonzero(one.made_up), np.flatnonzero(~one.made_up)):
        times[:, side] = generator.multinomial(len(side), np.full(len(side), 1 / len(side)), 1000)
    low, high = np.quantile(compute_auroc(one.risk, one.made_up, times), [0.025, 0.975])
    return high - low


def risks(risk, made_up, seed=0, at=None):
    risk = np.array(risk, dtype=float)
    rows = np.arange(len(risk)) if at is None else np.array(at)
    return SeedRisks(seed, rows, risk, risk, np.array(made_up, dtype=bool))


def noisy(count, seed, strength, at=None):
    """Answers in turns made up and right, with risks that tell, more or less."""
    made_up = np.arange(count) % 2 == 0
    noise = np.random.default_rng(seed).normal(size=count)
    rows = np.arange(count) if at is None else at
    return risks(1 / (1 + np.exp(-(strength * made_up[rows] + noise[rows]))), made_up[rows], seed, rows)


def questions(count):
    return [f"Question {i}?" for i in range(count)]


@pytest.mark.parametrize("name", METRICS)
def test_an_answer_drawn_twice_counts_as_two_and_one_not_drawn_as_none(name):
    """Against the plain figure of the answers written out, with ties among the risks."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        risk = generator.integers(1, 8, 20) / 8
        made_up = np.arange(20) < 9
        times = generator.integers(0, 4, (1, 20))
        times[0, [0, 19]] = 1
        written_out = np.repeat(np.arange(20), times[0])
        expected = PLAIN[name](made_up[written_out], risk[written_out])
        assert METRICS[name](risk, made_up, times)[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_resample_without_a_class_has_no_figure(name):
    times = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    found = METRICS[name](np.array([0.1, 0.9, 0.3, 0.4]), np.array([True, True, False, False]), times)
    assert np.isnan(found).tolist() == [True, True, False]


def test_a_paired_difference_by_hand():
    """Two questions of each class; ours orders all four pairs, the rival three. Two resamples: all once, and the rival's wrong
    pair four times."""
    ours, rival = risks([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]), risks([0.9, 0.2, 0.3, 0.1], [1, 1, 0, 0])
    drawn = Resamples(np.array([[1, 1, 1, 1], [0, 2, 2, 0]], dtype=np.uint8), np.arange(4), np.zeros((2, 1), dtype=np.int64))
    results = [DetectorResult(name, {}, [t], 0.5, 0.5) for name, t in (("ours", ours), ("rival", rival))]
    found = estimate_difference(*results, drawn)
    assert found.auroc.value == pytest.approx(0.25)
    # Differences of the two resamples are 0.25 and 1, and percentiles lie between them.
    assert found.auroc.low == pytest.approx(0.25 + 0.025 * 0.75)
    assert found.auroc.high == pytest.approx(0.25 + 0.975 * 0.75)
    assert found.beats


def test_the_same_detector_differs_from_itself_by_nothing():
    result = DetectorResult("a", {}, [noisy(100, seed, 1) for seed in range(3)], 0.5, 0.5)
    found = estimate_difference(result, result, draw_resamples(questions(100), 3))
    assert (found.auroc.value, found.auroc.low, found.auroc.high, found.beats) == (0, 0, 0, False)
    other = DetectorResult("b", {}, [noisy(100, seed, 1, np.arange(50)) for seed in range(3)], 0.5, 0.5)
    with pytest.raises(ValueError, match="different answers"):
        estimate_difference(result, other, draw_resamples(questions(100), 3))


def test_a_pair_is_told_apart_better_than_by_two_intervals():
    """What two detectors share - the questions that were drawn - is no part of what is between them."""
    strong, weak = ([noisy(300, 7, strength) for _ in range(3)] for strength in (1.5, 1.2))
    drawn = draw_resamples(questions(300), 3)
    alone = estimate_metric(compute_auroc, strong, drawn)
    apart = estimate_difference(DetectorResult("s", {}, strong, 0, 0), DetectorResult("w", {}, weak, 0, 0), drawn)
    assert apart.beats
    assert apart.auroc.high - apart.auroc.low < (alone.high - alone.low) / 2


def test_seeds_that_say_the_same_are_no_more_evidence_than_one():
    one = estimate_metric(compute_auroc, [noisy(200, 1, 1)], draw_resamples(questions(200), 1))
    five = estimate_metric(compute_auroc, [noisy(200, 1, 1)] * 5, draw_resamples(questions(200), 5))
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.1)
    assert one.high - one.low == pytest.approx(bootstrapped(noisy(200, 1, 1)), rel=0.15)


def test_an_interval_holds_its_figure_and_narrows_with_more_answers():
    few, many = (
        estimate_metric(compute_auroc, [noisy(count, 1, 1)], draw_resamples(questions(count), 1)) for count in (40, 1000)
    )
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_seeds_that_differ_widen_the_interval():
    drawn = draw_resamples(questions(200), 4)
    alike = estimate_metric(compute_auroc, [noisy(200, 1, 1)] * 4, drawn)
    unlike = estimate_metric(compute_auroc, [noisy(200, 1, strength) for strength in (0, 0.6, 1.4, 2)], drawn)
    assert unlike.high - unlike.low > 1.5 * (alike.high - alike.low)


def test_answers_to_one_question_are_drawn_together():
    asked = ["who", "who", "where", "when"]
    drawn = draw_resamples(asked, 2)
    times = drawn.get_counts(np.arange(4))
    assert np.array_equal(times[:, 0], times[:, 1])
    assert drawn.times.shape[1] == 3
    assert (drawn.times.sum(1) == 3).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """AUROC of unit normals one apart is Phi(1 / sqrt 2); 60 data sets of 300 questions, each tested by three seeds."""
    held = 0
    for repeat in range(60):
        generator = np.random.default_rng(repeat)
        made_up = generator.random(300) < 0.5
        score = made_up + generator.normal(size=300)
        tests = []
        for seed in range(3):
            at = np.flatnonzero(generator.random(300) < 0.4)
            tests.append(risks(1 / (1 + np.exp(-score[at])), made_up[at], seed, at))
        found = estimate_metric(compute_auroc, tests, draw_resamples(questions(300), 3, count=300))
        held += found.low <= 0.7602 <= found.high
    assert held >= 53


def test_kinds_have_their_own_figure_where_there_are_enough_answers():
    t = noisy(100, 0, 6)
    sources = np.array(["easy"] * 60 + ["few"] * 12 + ["hard"] * 28)
    hard = sources == "hard"
    risk = np.where(hard, 0.5, t.risk)
    kinds = measure_by_kind([risks(risk, t.made_up)], sources, draw_resamples(questions(100), 1))
    assert [(k.source, k.count, k.made_up) for k in kinds] == [("easy", 60, 30), ("hard", 28, 14), ("few", 12, 6)]
    assert kinds[0].auroc.value > 0.99
    assert kinds[1].auroc.value == 0.5
    assert np.isnan(kinds[2].auroc.value)


def test_counts_are_of_different_answers():
    found = measure_result([noisy(40, seed, 1) for seed in range(3)], draw_resamples(questions(40), 3))
    assert (found.count, found.made_up) == (40, 20)


def test_curves_by_hand():
    """Risks 0.9 (made up), 0.6 (right), 0.4 (made up), 0.1 (right)."""
    risk, made_up = np.array([0.9, 0.6, 0.4, 0.1]), np.array([True, False, True, False])
    roc = compute_roc(risk, made_up)
    # Nothing flagged catches half; one of two right answers flagged catches all; between them a straight line.
    assert roc[[0, 25, 50, 100]].tolist() == pytest.approx([0.5, 0.75, 1, 1])
    coverage = compute_coverage(risk, made_up)
    assert coverage[[25, 50, 75, 100]].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    flat = compute_roc(np.full(4, 0.3), made_up)
    assert flat.tolist() == pytest.approx(GRID.tolist())


def test_the_area_under_the_drawn_roc_is_the_auroc():
    t = noisy(2000, 3, 1)
    area = np.trapezoid(compute_roc(t.risk, t.made_up), GRID)
    assert area == pytest.approx(plain(compute_auroc, t.risk, t.made_up), abs=0.005)


def test_reliability_bins_of_all_seeds_by_hand():
    tests = [risks([0.05, 0.15, 0.95], [0, 1, 1]), risks([0.05, 0.15, 0.95], [1, 0, 1], 1)]
    bins = compute_curves("a", tests).after
    assert [(round(b.risk, 2), b.frequency, b.count) for b in bins] == [(0.05, 0.5, 2), (0.15, 0.5, 2), (0.95, 1.0, 2)]

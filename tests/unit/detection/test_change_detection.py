"""Sequential detection of a change, without assumptions on the distribution."""

import numpy as np
import pytest
from scipy.stats import kstest

from trimtab.stats.change_detection import compute_conformal_p_values, compute_evidence, detect_change

RUN_LENGTH = 200.0


def draw_values(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    # Heavy tails: no moment of this distribution exists.
    return np.random.default_rng(seed).standard_cauchy(count) + shift


def test_p_values_are_uniform_without_a_change():
    p_values = [
        compute_conformal_p_values(draw_values(seed, 50), draw_values(seed + 1000, 100), np.random.default_rng(seed))
        for seed in range(20)
    ]
    assert kstest(np.concatenate(p_values), "uniform").pvalue > 0.01
    ties = compute_conformal_p_values(np.zeros(50), np.zeros(2000), np.random.default_rng(0))
    assert kstest(ties, "uniform").pvalue > 0.01


def test_small_p_values_belong_to_large_values():
    p_values = compute_conformal_p_values(draw_values(0, 500), np.array([1e9, -1e9]), np.random.default_rng(0))
    assert p_values[0] < 0.01 < 0.99 < p_values[1]


def test_evidence_grows_with_time_at_most_on_average():
    evidence = [compute_evidence(p_values) for p_values in np.random.default_rng(0).random((4000, 10))]
    assert np.mean(evidence, axis=0)[-1] == pytest.approx(10, rel=0.1)


def test_mean_run_length_without_a_change_is_above_the_bound():
    lengths = []
    for seed in range(60):
        reference, stream = draw_values(seed, 200), draw_values(seed + 5000, 2000)
        lengths.append(detect_change([reference], [stream], RUN_LENGTH, seed).alarm or len(stream))
    assert np.mean(lengths) > RUN_LENGTH


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_change_is_detected(shift):
    alarms = []
    for seed in range(20):
        stream = np.concatenate([draw_values(seed + 7000, 100), draw_values(seed + 8000, 400, shift)])
        constant = np.zeros(len(stream))
        result = detect_change([draw_values(seed, 500), np.zeros(500)], [stream, constant], 10_000, seed)
        alarms.append(result.alarm or 0)
    assert np.mean([100 < alarm <= 400 for alarm in alarms]) > 0.9

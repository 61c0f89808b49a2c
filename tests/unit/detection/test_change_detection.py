"""Sequential detection of a change, without assumptions on the distribution."""

import numpy as np
import pytest
from scipy.stats import kstest

from trimtab.stats.change_detection import MOST_VALUES, ChangeMonitor, detect_change

RUN_LENGTH = 200.0


def draw_values(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    # Heavy tails: no moment of this distribution exists.
    return np.random.default_rng(seed).standard_cauchy(count) + shift


def compute_p_values(reference: np.ndarray, stream: np.ndarray, seed: int) -> list[float]:
    monitor = ChangeMonitor(reference.tolist(), seed)
    return [monitor.compute_p_value(value) for value in stream.tolist()]


def test_p_values_are_uniform_without_a_change():
    p_values = [compute_p_values(draw_values(seed, 50), draw_values(seed + 1000, 100), seed) for seed in range(20)]
    assert kstest(np.concatenate(p_values), "uniform").pvalue > 0.01
    assert kstest(compute_p_values(np.zeros(50), np.zeros(2000), 0), "uniform").pvalue > 0.01


def test_small_p_values_belong_to_large_values():
    p_values = compute_p_values(draw_values(0, 500), np.array([1e9, -1e9]), 0)
    assert p_values[0] < 0.01 < 0.99 < p_values[1]


def test_evidence_grows_with_time_at_most_on_average():
    evidence = []
    for p_values in np.random.default_rng(0).random((4000, 10)):
        monitor = ChangeMonitor([])
        evidence.append([monitor.add_p_value(p) for p in p_values][-1])
    assert np.mean(evidence) == pytest.approx(10, rel=0.1)


def test_evidence_of_extreme_values_is_finite():
    monitor = ChangeMonitor([])
    evidence = [monitor.add_p_value(p) for p in [0.0, 1.0] * 2000]
    assert np.isfinite(evidence).all()
    assert monitor.count == 4000


def test_memory_is_bounded():
    monitor = ChangeMonitor(range(MOST_VALUES - 1))
    p_values = [monitor.compute_p_value(0.5) for _ in range(3)]
    assert len(monitor._ordered) == MOST_VALUES
    assert min(p_values) > 0.99


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

"""Calibration of detector scores: Platt scaling, risks and thresholds."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trimtab.detection.calibration import (
    FALSE_POSITIVE_RATES,
    compute_balanced_threshold,
    compute_risk,
    compute_supported_thresholds,
    compute_thresholds,
    fit_platt,
)


def draw_scores(count: int, slope: float = 0.7, offset: float = -1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scores, and labels with a probability of sigmoid(slope * score + offset)."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(count, generator=generator) + 5
    return scores, (torch.rand(count, generator=generator) < torch.sigmoid(slope * (scores - 5) + offset)).float()


def test_platt_recovers_slope_and_offset():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20_000, generator=generator)
    truthful = (torch.rand(20_000, generator=generator) < torch.sigmoid(0.7 * scores - 1)).float()
    slope, offset = fit_platt(scores, truthful).tolist()
    assert slope == pytest.approx(0.7, abs=0.05)
    assert offset == pytest.approx(-1, abs=0.08)


@pytest.mark.parametrize(("count", "slope"), [(12, 0.7), (80, 0.7), (80, 0.1)])
def test_platt_equals_scipy_with_smoothed_targets(count, slope):
    """Platt's targets are (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0."""
    scores, truthful = draw_scores(count, slope)
    right, x = int(truthful.sum()), scores.double().numpy()
    assert 0 < right < count
    targets = np.where(truthful.numpy() == 1, (right + 1) / (right + 2), 1 / (count - right + 2))

    def compute_loss(weights: np.ndarray) -> float:
        logits = weights[0] * x + weights[1]
        return float(np.mean(np.logaddexp(0, logits) - targets * logits))

    expected = minimize(compute_loss, np.zeros(2), method="BFGS", tol=1e-10).x
    assert fit_platt(scores, truthful).tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)


def test_platt_separable_scores_have_a_finite_slope():
    slope, offset = fit_platt(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])).tolist()
    assert 0 < slope < 10
    assert math.isfinite(offset)


@pytest.mark.parametrize(("labels", "share"), [([1.0, 1.0, 0.0, 0.0], 3 / 6), ([1.0, 1.0, 1.0, 0.0], 4 / 6)])
def test_platt_does_not_invert_scores(labels, share):
    """Useless scores give every answer the smoothed share of right answers."""
    slope, offset = fit_platt(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(labels)).tolist()
    assert slope == 0
    assert offset == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_equal_scores_have_equal_finite_risks():
    calibration = fit_platt(torch.full((6,), 2.0), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    risk = compute_risk(torch.full((6,), 2.0), calibration)
    assert risk.isfinite().all()
    assert risk.tolist() == pytest.approx([1 - 0.375] * 6, abs=0.02)


def test_risk_is_the_probability_of_a_made_up_answer():
    risk = compute_risk(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0]))
    assert risk.tolist() == pytest.approx([1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(2.0))])


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (100, {"0.01": 98, "0.05": 94, "0.1": 89}),
        (10, {"0.01": 9, "0.05": 9, "0.1": 8}),
        (1, dict.fromkeys(FALSE_POSITIVE_RATES, 0)),
    ],
)
def test_threshold_is_the_smallest_risk_with_the_rate(count, expected):
    """Right answers have the risks 0, 1, 2, ...; made-up answers do not count."""
    right = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()
    risk, truthful = torch.cat([right, torch.full((7,), 1e6)]), torch.cat([torch.ones(count), torch.zeros(7)])
    thresholds = compute_thresholds(risk, truthful)
    assert thresholds == expected
    for rate, threshold in thresholds.items():
        assert (right > threshold).sum() <= float(rate) * count


def test_thresholds_respect_false_positive_rates():
    generator = torch.Generator().manual_seed(0)
    risk, truthful = torch.rand(400, generator=generator), (torch.arange(400) % 2).float()
    for rate, threshold in compute_thresholds(risk, truthful).items():
        flagged = (risk[truthful == 1] > threshold).float().mean()
        assert float(rate) - 0.006 <= flagged <= float(rate)


def test_threshold_without_right_answers_flags_nothing():
    assert compute_thresholds(torch.tensor([0.2, 0.9]), torch.zeros(2)) == dict.fromkeys(FALSE_POSITIVE_RATES, 1.0)


@pytest.mark.parametrize(
    ("negatives", "rates"), [(49, set()), (50, {"0.1"}), (99, {"0.1"}), (100, {"0.1", "0.05"}), (500, {"0.1", "0.05", "0.01"})]
)
def test_level_needs_enough_negatives(negatives, rates):
    risk = torch.rand(negatives + 10, generator=torch.Generator().manual_seed(0))
    truthful = (torch.arange(negatives + 10) < negatives).float()
    thresholds = compute_supported_thresholds(risk, truthful)
    assert thresholds.keys() == rates | {"balanced"}
    assert all(thresholds[rate] == compute_thresholds(risk, truthful)[rate] for rate in rates)


def test_balanced_threshold_separates_classes_of_any_size():
    risk = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.5, 0.9, 0.8])
    truthful = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    # Above 0.3: all three positives are flagged, and three of four negatives pass. Above 0.6: two, and all negatives pass.
    assert compute_balanced_threshold(risk, truthful) == pytest.approx(0.3)
    threshold = compute_balanced_threshold(torch.cat([risk, torch.full((90,), 0.05)]), torch.cat([truthful, torch.ones(90)]))
    assert threshold == pytest.approx(0.3)

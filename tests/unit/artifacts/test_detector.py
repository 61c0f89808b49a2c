"""Detectors as artifacts, their calibration, and the figures they are judged by."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn import metrics

from tests.support.factories import plain
from trimtab import heads
from trimtab.detection.calibration import FALSE_POSITIVE_RATES, compute_thresholds, fit_platt
from trimtab.detection.detector import CARD, FILE, DetectorCard, build_detector, load_detector, save_detector
from trimtab.errors import ArtifactError
from trimtab.evaluation.detection.metrics import (
    compute_auprc,
    compute_aurc,
    compute_auroc,
    compute_ece,
    compute_fpr95,
    compute_risk_coverage,
)

WIDTH = 8


@pytest.fixture
def made(tiny_base):
    torch.manual_seed(0)
    head = heads.get_head("flag")(WIDTH, 2, groups=4, projection=16, hidden=32)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    card = DetectorCard(
        "d",
        tiny_base.name,
        tiny_base.fingerprint,
        [3, 5],
        WIDTH,
        "flag",
        settings,
        -2.0,
        dict.fromkeys(FALSE_POSITIVE_RATES, 0.6),
    )
    return build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([2.0, 0.5]), card)


@pytest.fixture
def tiny_base(tmp_path):
    from trimtab.model.base_model import BaseModel

    return BaseModel("tiny", tmp_path, "0123456789abcdef", WIDTH, 100, 6)


def test_a_detector_is_the_same_after_saving_and_loading(made, tiny_base, tmp_path):
    again = load_detector(save_detector(made, tmp_path / "d"), tiny_base)
    psi, phi = torch.randn(5, 2, 3 * WIDTH), torch.randn(5, 7)
    assert again.card == made.card
    assert torch.equal(again.compute_risk(psi, phi), made.compute_risk(psi, phi))
    assert again.card.thresholds == dict.fromkeys(FALSE_POSITIVE_RATES, 0.6)


def damaged(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


DAMAGES = {
    "no detector.safetensors": lambda f: (f / FILE).unlink(),
    "no card.json": lambda f: (f / CARD).unlink(),
    "truncated": lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-5]),
    "NaN": lambda f: damaged(f, lambda t: t["platt"].fill_(float("nan"))),
    "digest differs": lambda f: damaged(f, lambda t: t["platt"].add_(1)),
    "does not hold the head": lambda f: recarded(f, head="linear"),
    "the card of a 'prefix', not of a detector": lambda f: recarded(f, kind="prefix"),
    "version 9": lambda f: recarded(f, card_version=9),
    "unknown fields": lambda f: recarded(f, colour="red"),
}


def recarded(folder, **changes):
    path = folder / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("said", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused(made, tmp_path, said):
    folder = save_detector(made, tmp_path / "d")
    DAMAGES[said](folder)
    with pytest.raises(ArtifactError, match=said.replace("(", r"\(")):
        load_detector(folder)


def test_another_base_model_is_refused(made, tiny_base, tmp_path):
    with pytest.raises(ArtifactError, match="Collect signals and train a detector"):
        load_detector(save_detector(made, tmp_path / "d"), replace(tiny_base, fingerprint="f" * 16))


def test_platt_finds_the_slope_and_offset_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20_000, generator=generator)
    truthful = (torch.rand(20_000, generator=generator) < torch.sigmoid(0.7 * scores - 1)).float()
    slope, offset = fit_platt(scores, truthful).tolist()
    assert slope == pytest.approx(0.7, abs=0.05)
    assert offset == pytest.approx(-1, abs=0.08)


def test_scores_that_are_worse_than_none_are_not_turned_round():
    slope, offset = fit_platt(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist()
    assert (slope, offset) == (0, pytest.approx(0, abs=1e-6))


def test_thresholds_flag_no_more_right_answers_than_asked_for():
    generator = torch.Generator().manual_seed(0)
    risk, truthful = torch.rand(400, generator=generator), (torch.arange(400) % 2).float()
    for alarms, threshold in compute_thresholds(risk, truthful).items():
        flagged = (risk[truthful == 1] > threshold).float().mean()
        assert float(alarms) - 0.006 <= flagged <= float(alarms)


RISK = np.array([0.9, 0.8, 0.4, 0.3, 0.2])
MADE_UP = np.array([True, False, True, False, False])


def test_figures_by_hand():
    assert plain(compute_auroc, RISK, MADE_UP) == pytest.approx(5 / 6)
    assert plain(compute_auprc, RISK, MADE_UP) == pytest.approx((1 + 2 / 3) / 2)
    assert plain(compute_fpr95, RISK, MADE_UP) == pytest.approx(1 / 3)
    assert compute_ece(RISK, MADE_UP) == pytest.approx((0.1 + 0.8 + 0.6 + 0.3 + 0.2) / 5)
    shares, errors = compute_risk_coverage(RISK, MADE_UP)
    assert shares.tolist() == [0.2, 0.4, 0.6, 0.8, 1]
    assert errors.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])


def test_equal_risks_are_worth_nothing_whatever_their_order():
    flat = np.full(4, 0.5)
    first, last = np.array([True, False, False, False]), np.array([False, False, False, True])
    assert plain(compute_auroc, flat, first) == 0.5
    assert plain(compute_aurc, flat, first) == plain(compute_aurc, flat, last) == 0.25


def test_ranking_figures_are_those_of_scikit_learn():
    """A thousand resamples of each want something faster, with the same results; ties and all."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        risk, made_up = generator.integers(0, 12, 60) / 12, generator.random(60) < 0.4
        assert plain(compute_auroc, risk, made_up) == pytest.approx(metrics.roc_auc_score(made_up, risk))
        assert plain(compute_auprc, risk, made_up) == pytest.approx(metrics.average_precision_score(made_up, risk))
        false, caught, _ = metrics.roc_curve(made_up, risk, drop_intermediate=False)
        assert plain(compute_fpr95, risk, made_up) == pytest.approx(false[caught >= 0.95].min())

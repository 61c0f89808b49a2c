"""Detectors as artifacts: storage, calibration and metrics."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn import metrics

from tests.support.factories import compute_metric
from trimtab import heads
from trimtab.artifacts.card import add_checksum
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import FILE, build_detector, load_detector, save_detector
from trimtab.detection.detector_card import CARD, DetectorCard
from trimtab.errors import ArtifactError
from trimtab.evaluation.detection.metrics import (
    compute_auprc,
    compute_aurc,
    compute_auroc,
    compute_ece,
    compute_fpr95,
    compute_risk_coverage,
)
from trimtab.model.base_model import BaseModel

WIDTH = 8


@pytest.fixture
def stub_detector(stub_base):
    torch.manual_seed(0)
    head = heads.get_head("flag")(WIDTH, 2, groups=4, projection=16, hidden=32)
    settings = {"groups": 4, "projection": 16, "hidden": 32}
    card = DetectorCard(
        "d",
        stub_base.name,
        stub_base.fingerprint,
        [3, 5],
        WIDTH,
        "flag",
        settings,
        -2.0,
        dict.fromkeys(FALSE_POSITIVE_RATES, 0.6),
    )
    return build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([2.0, 0.5]), card)


@pytest.fixture
def stub_base(tmp_path):
    return BaseModel("tiny", tmp_path, "0123456789abcdef", WIDTH, 100, 6)


def test_saved_detector_loads_unchanged(stub_detector, stub_base, tmp_path):
    loaded = load_detector(save_detector(stub_detector, tmp_path / "d"), stub_base)
    psi, phi = torch.randn(5, 2, 3 * WIDTH), torch.randn(5, 7)
    assert loaded.card == stub_detector.card
    assert torch.equal(loaded.compute_risk(psi, phi), stub_detector.compute_risk(psi, phi))
    assert loaded.card.thresholds == dict.fromkeys(FALSE_POSITIVE_RATES, 0.6)


def modify_tensors(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


DAMAGES = {
    "no detector.safetensors": lambda f: (f / FILE).unlink(),
    "no card.json": lambda f: (f / CARD).unlink(),
    "truncated": lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-5]),
    "NaN": lambda f: modify_tensors(f, lambda t: t["platt"].fill_(float("nan"))),
    "digest differs": lambda f: modify_tensors(f, lambda t: t["platt"].add_(1)),
    "does not hold the head": lambda f: modify_card(f, head="linear"),
    "the card of a 'prefix', not of a detector": lambda f: modify_card(f, kind="prefix"),
    "version 9": lambda f: modify_card(f, card_version=9),
    "field colour is invalid": lambda f: modify_card(f, colour="red"),
    "should be a finite number": lambda f: modify_card(f, thresholds=dict.fromkeys(FALSE_POSITIVE_RATES, float("nan"))),
    "field layers.0 is invalid": lambda f: modify_card(f, layers=[[2], [4]]),
    "layers must be different layer numbers": lambda f: modify_card(f, layers=[2, 2]),
    "field low_log_probability is invalid": lambda f: modify_card(f, low_log_probability="x"),
    "thresholds must be risks by the": lambda f: modify_card(f, thresholds={"0.05": 0.5}),
    "positive rates and balanced": lambda f: modify_card(f, subject="prompt", thresholds={"0.05": 0.5}),
    "field subject is invalid": lambda f: modify_card(f, subject="weather"),
    "checksum differs": lambda f: (f / CARD).write_text((f / CARD).read_text().replace("0.6", "1.0")),
}


def modify_card(folder, **changes):
    path = folder / CARD
    path.write_text(json.dumps(add_checksum(json.loads(path.read_text()) | changes)))


@pytest.mark.parametrize("message", DAMAGES)
def test_rejects_damaged_or_foreign_files(stub_detector, tmp_path, message):
    folder = save_detector(stub_detector, tmp_path / "d")
    DAMAGES[message](folder)
    with pytest.raises(ArtifactError, match=message.replace("(", r"\(")):
        load_detector(folder)


def test_head_of_a_card_is_not_built_before_its_shapes_match(stub_detector, tmp_path):
    """Such a head takes 30 TB: a card of some hundred bytes must not end the process."""
    folder = save_detector(stub_detector, tmp_path / "d")
    modify_card(folder, head_options={"hidden": 1 << 40})
    with pytest.raises(ArtifactError, match="does not hold the head"):
        load_detector(folder)


def test_rejects_other_base_model(stub_detector, stub_base, tmp_path):
    with pytest.raises(ArtifactError, match="Collect signals and train a detector"):
        load_detector(save_detector(stub_detector, tmp_path / "d"), replace(stub_base, fingerprint="f" * 16))


RISK = np.array([0.9, 0.8, 0.4, 0.3, 0.2])
MADE_UP = np.array([True, False, True, False, False])


def test_metrics_equal_hand_computed_values():
    assert compute_metric(compute_auroc, RISK, MADE_UP) == pytest.approx(5 / 6)
    assert compute_metric(compute_auprc, RISK, MADE_UP) == pytest.approx((1 + 2 / 3) / 2)
    assert compute_metric(compute_fpr95, RISK, MADE_UP) == pytest.approx(1 / 3)
    assert compute_ece(RISK, MADE_UP) == pytest.approx((0.1 + 0.8 + 0.6 + 0.3 + 0.2) / 5)
    coverage, errors = compute_risk_coverage(RISK, MADE_UP)
    assert coverage.tolist() == [0.2, 0.4, 0.6, 0.8, 1]
    assert errors.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])


def test_tied_risks_have_chance_metrics_in_any_order():
    risk = np.full(4, 0.5)
    first_made_up, last_made_up = np.array([True, False, False, False]), np.array([False, False, False, True])
    assert compute_metric(compute_auroc, risk, first_made_up) == 0.5
    assert compute_metric(compute_aurc, risk, first_made_up) == compute_metric(compute_aurc, risk, last_made_up) == 0.25


def test_ranking_metrics_equal_scikit_learn():
    """Random risks, with ties."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        risk, made_up = generator.integers(0, 12, 60) / 12, generator.random(60) < 0.4
        assert compute_metric(compute_auroc, risk, made_up) == pytest.approx(metrics.roc_auc_score(made_up, risk))
        assert compute_metric(compute_auprc, risk, made_up) == pytest.approx(metrics.average_precision_score(made_up, risk))
        false_positives, true_positives, _ = metrics.roc_curve(made_up, risk, drop_intermediate=False)
        assert compute_metric(compute_fpr95, risk, made_up) == pytest.approx(false_positives[true_positives >= 0.95].min())

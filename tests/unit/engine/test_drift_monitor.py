"""Monitors of the risks of live answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from trimtab.engine.detectors import drift_monitor
from trimtab.engine.detectors.drift_monitor import DriftMonitors
from trimtab.engine.metrics import DRIFT


def load(version: int, count: int = 200) -> SimpleNamespace:
    """Return a version whose reference risks are spread evenly from 0 to 1."""
    card = SimpleNamespace(reference_risks=np.linspace(0, 1, count).tolist())
    return SimpleNamespace(version=SimpleNamespace(name="truth", version=version), artifact=SimpleNamespace(card=card))


def read_gauge(version: int) -> float | None:
    samples = [s.value for metric in DRIFT.collect() for s in metric.samples if s.labels["detector_version"] == str(version)]
    return samples[0] if samples else None


def test_higher_risks_shift_the_status():
    monitors, generator = DriftMonitors(), np.random.default_rng(0)
    for risk in generator.random(300):
        monitors.observe_risk(load(1), risk)
    assert monitors.describe()["truth@1"]["status"] == "stable"
    for risk in 0.7 + 0.3 * generator.random(200):
        monitors.observe_risk(load(1), risk)
    status = monitors.describe()["truth@1"]
    assert (status["status"], status["answers"]) == ("shifted", 500)
    assert status["evidence"] > 1
    assert read_gauge(1) == pytest.approx(status["evidence"], rel=1e-2)
    # The alarm stays when the traffic returns.
    for risk in generator.random(500):
        monitors.observe_risk(load(1), risk)
    assert monitors.describe()["truth@1"]["status"] == "shifted"


def test_detectors_with_few_reference_risks_are_not_monitored():
    monitors = DriftMonitors()
    monitors.observe_risk(load(2, count=10), 0.5)
    assert monitors.describe() == {}


def test_number_of_monitors_is_bounded(monkeypatch):
    monkeypatch.setattr(drift_monitor, "MOST_MONITORS", 2)
    monitors = DriftMonitors()
    for version in (11, 12, 13):
        monitors.observe_risk(load(version), 0.5)
    assert list(monitors.describe()) == ["truth@12", "truth@13"]
    assert read_gauge(11) is None

"""Detectors of collected answers and of answers that a server has stored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.factories import write_prompt_dataset, write_signal_dataset
from tests.support.live_answers import write_live_dataset
from trimtab.cli.main import main
from trimtab.detection.detector import load_detector
from trimtab.detection.merged_dataset import find_reserved_rows, merge_datasets
from trimtab.detection.mixture import choose_mixture
from trimtab.detection.signal_dataset import read_dataset
from trimtab.detection.training import split_data
from trimtab.errors import UsageError
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import DetectResult, train_detectors
from trimtab.jobs.drift.config import DriftConfig
from trimtab.jobs.drift.job import measure_drift
from trimtab.jobs.promote.detector_metrics import compute_risk_at
from trimtab.jobs.refresh.config import RefreshConfig
from trimtab.jobs.refresh.job import refresh_detector
from trimtab.tracking import registry
from trimtab.tracking.promotions import record_decision
from trimtab.tracking.run_artifacts import read_json_artifact

pytestmark = pytest.mark.usefixtures("cluster", "home")

LAYERS = (20, 29)


@pytest.fixture(scope="module")
def collected(base, tmp_path_factory):
    return write_signal_dataset(tmp_path_factory.mktemp("signals") / "collected", base, LAYERS)


@pytest.fixture(scope="module")
def live(base, tmp_path_factory):
    """300 stored answers, all with a label of a trusted rater."""
    return write_live_dataset(tmp_path_factory.mktemp("live"), base, LAYERS, 300, 300)


def train(name: str, *folders: Path, **fields) -> DetectResult:
    return train_detectors(DetectConfig([str(f) for f in folders], "linear", layers=[29], num_seeds=1, name=name, **fields))


def read_evidence(detected: DetectResult) -> list[str]:
    return read_json_artifact(detected.version.run_id, "evaluation/evidence.json")["keys"]


def test_live_labels_improve_the_champion(base, collected, live, tmp_path):
    first = train("loop", collected, out=str(tmp_path / "first"))
    assert "champion" in first.version.aliases
    second = train("loop", collected, live, signal_weights=[1, 2], out=str(tmp_path / "second"))
    assert "champion" in second.version.aliases
    assert "promoted to champion" in second.gate
    data = read_dataset(live)
    reserved = data.select_rows(find_reserved_rows(data, 0.2))
    assert sorted(read_evidence(second)) == sorted(reserved.keys)
    risk = compute_risk_at(detector := load_detector(second.folder, base), reserved, torch.arange(len(reserved.keys)))
    assert risk[reserved.truthful == 0].mean() > risk[reserved.truthful == 1].mean() + 0.3
    assert risk.mean().item() == pytest.approx((reserved.truthful == 0).float().mean().item(), abs=0.05)
    assert [source["rows"] for source in detector.card.data] == [400, 300]


def test_gate_needs_labels_of_trusted_raters(base, collected, tmp_path):
    untrusted = write_live_dataset(tmp_path / "live", base, LAYERS, 300, 300, trusted=False)
    train("doubtful", collected, out=str(tmp_path / "first"))
    second = train("doubtful", collected, untrusted, out=str(tmp_path / "second"))
    assert list(second.version.aliases) == ["candidate"]
    assert "0 reserved labels of trusted raters" in second.gate
    assert "trimtab feedback ask" in second.gate


def test_detectors_are_trained_on_live_answers_alone(live, tmp_path):
    detected = train("alone", live, split="time", out=str(tmp_path / "alone"))
    assert detected.results[0].auroc > 0.75
    assert detected.out_of_fold[0].auroc.value > 0.75


def test_live_labels_of_prompts_improve_a_guard(base, tmp_path):
    collected = write_prompt_dataset(tmp_path / "collected", base, LAYERS, 1)
    live = write_live_dataset(tmp_path / "live", base, LAYERS, 300, 300, subject="prompt")
    train("guarded", collected, out=str(tmp_path / "first"))
    second = train("guarded", collected, live, signal_weights=[1, 2], out=str(tmp_path / "second"))
    assert "champion" in second.version.aliases
    data = read_dataset(live)
    reserved = data.select_rows(find_reserved_rows(data, 0.2))
    assert sorted(read_evidence(second)) == sorted(reserved.keys)
    detector = load_detector(second.folder, base)
    assert detector.card.subject == "prompt"
    assert len(detector.card.reference_risks) >= 50


def test_merged_rows_count_once_at_common_layers(base, collected, live):
    data = {str(folder): read_dataset(folder, base) for folder in (collected, live)}
    merged = merge_datasets(data, [1, 3])
    assert len(merged.keys) == 700
    assert merged.is_live.sum() == 300
    assert merged.repeats[merged.is_live].unique().tolist() == [3]
    assert len(merge_datasets({"a": data[str(live)], "b": data[str(live)]}, [1, 1]).keys) == 300
    reserved = find_reserved_rows(merged, 0.2)
    assert 30 < reserved.sum() < 90
    assert not (reserved & ~merged.is_live).any()
    assert (find_reserved_rows(merged, 0.1) <= reserved).all()


@pytest.mark.parametrize(("flip", "weights"), [(False, [1, 1]), (True, [0, 1])])
def test_labels_choose_the_weight_of_collected_rows(base, live, tmp_path, flip, weights):
    other = read_dataset(write_live_dataset(tmp_path / "other", base, LAYERS, 300, 300, start=1000))
    truthful = 1 - other.truthful if flip else other.truthful
    collected = replace(other, truthful=truthful, times=torch.full_like(other.times, float("nan")))
    mixture = choose_mixture({"collected": collected, "live": read_dataset(live)}, 0.2)
    assert mixture.weights == weights
    assert mixture.aurocs[1.0] < mixture.aurocs[0.0] if flip else mixture.aurocs[1.0] > 0.7
    assert "AUROC on live labels" in str(mixture)


def test_few_labels_leave_no_collected_rows_out(base, collected, tmp_path):
    few = read_dataset(write_live_dataset(tmp_path / "few", base, LAYERS, 60, 60))
    mixture = choose_mixture({"collected": read_dataset(collected), "few": few}, 0.2)
    assert 0.0 not in mixture.aurocs
    assert 1.0 in mixture.aurocs


def test_few_labels_choose_no_weights(base, collected, tmp_path):
    few = write_live_dataset(tmp_path / "few", base, LAYERS, 40, 12)
    mixture = choose_mixture({"collected": read_dataset(collected), "few": read_dataset(few)}, 0.2)
    assert (mixture.weights, mixture.aurocs) == ([1, 1], {})
    train("mixed", collected, few, signal_weights="auto", out=str(tmp_path / "mixed"))


def test_different_data_sets_are_not_merged(base, collected, tmp_path):
    prompts = write_prompt_dataset(tmp_path / "prompts", base, LAYERS, 1)
    with pytest.raises(UsageError, match="has subject prompt"):
        merge_datasets({"a": read_dataset(collected), "b": read_dataset(prompts)}, [1, 1])
    other = write_signal_dataset(tmp_path / "other", base, (3, 4))
    with pytest.raises(UsageError, match="have no common layer"):
        merge_datasets({"a": read_dataset(collected), "b": read_dataset(other)}, [1, 1])


def test_latest_answers_are_tested(live):
    data = read_dataset(live)
    splits = split_data(data.psi, data.traces, data.truthful, data.groups, 0, 0.1, 0.25, times=data.times)
    order = [data.times[rows] for rows in (splits.train_indices, splits.validation_indices, splits.test_indices)]
    assert order[0].max() < order[1].min()
    assert order[1].max() < order[2].min()
    assert [len(times) for times in order] == [195, 30, 75]
    repeated = split_data(data.psi, data.traces, data.truthful, data.groups, 0, 0.1, 0.25, repeats=2 * data.repeats)
    assert len(repeated.train) == 2 * len(repeated.train_indices.unique())


@pytest.mark.parametrize(("weights", "message"), [([1], "signal_weights has 1 numbers for 2"), ([1, 0], "must be from 1 to")])
def test_rejects_weights(weights, message):
    with pytest.raises(UsageError, match=message):
        DetectConfig(["a", "b"], signal_weights=weights)


def test_drift_shows_in_risks_states_and_labels(base, collected, live, tmp_path, capsys):
    train("drifting", collected, out=str(tmp_path / "first"))
    output = tmp_path / "drift.json"
    assert main(["drift", "--signals", str(live), "--detector", "drifting", "--json", str(output)]) == 0
    assert "shifted: alarm after" in capsys.readouterr().out
    shifted = json.loads(output.read_text())
    assert (shifted["status"], shifted["answers"]) == ("shifted", 300)
    assert shifted["alarm"] <= 300
    assert shifted["origin"]["low"] > 0.6
    # The labels show in states that the detector does not read.
    assert shifted["calibration"]["auroc"]["high"] < 0.65


def test_traffic_like_the_training_data_is_stable(base, live, tmp_path):
    train("steady", live, out=str(tmp_path / "first"))
    later = write_live_dataset(tmp_path / "later", base, LAYERS, 200, 60, start=1000)
    result = measure_drift(DriftConfig(str(later), "steady", reference=[str(live)]))
    assert (result.status, result.alarm) == ("stable", None)
    assert result.origin.low < 0.55
    assert result.calibration.auroc.value > 0.75
    with pytest.raises(UsageError, match="has 0 new answers"):
        measure_drift(DriftConfig(str(live), "steady", reference=[str(live)]))


def test_refresh_trains_shadows_and_promotes(base, collected, tmp_path, capsys):
    folder = tmp_path / "signals"
    live = write_live_dataset(folder, base, LAYERS, 300, 150)

    def refresh(*options):
        command = ["refresh", "fresh", "--signals", str(collected), str(live), "--layers", "[29]", "--num_seeds", "1"]
        output = tmp_path / "refresh.json"
        assert main([*command, "--min_labels", "100", "--shadow_answers", "50", *options, "--json", str(output)]) == 0
        return json.loads(output.read_text())

    assert refresh("--min_labels", "151")["reason"] == "150 new labels of trusted raters; a training needs 151"
    assert refresh("--dry_run", "true")["next_step"] == "train"
    trained = refresh()
    assert (trained["status"], trained["version"]) == ("shadow", 1)
    assert registry.find_champion(base.name, "fresh") is None
    assert "0 of 50 answers" in refresh()["reason"]
    write_live_dataset(folder, base, LAYERS, 60, 0, start=300)
    assert refresh("--dry_run", "true")["next_step"] == "promote"
    assert refresh("--max_flagged", "0.01")["status"] == "rejected"
    assert refresh()["status"] == "waiting"
    record_decision(registry.find_version(base.name, "fresh", "1"), passed=True, reason="again")
    promoted = refresh()
    assert promoted["status"] == "promoted"
    assert "60 answers, flagged" in promoted["reason"]
    assert registry.find_champion(base.name, "fresh").version == 1
    assert refresh()["reason"] == "0 new labels of trusted raters; a training needs 100"
    assert "fresh version 1: promoted" in capsys.readouterr().out


def test_refresh_needs_live_traffic(collected):
    with pytest.raises(UsageError, match="no stored answers"):
        refresh_detector(RefreshConfig("fresh", signals=str(collected)))

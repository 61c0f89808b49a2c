"""Collecting signals and learning detectors from them: data sets that can be gone on with, and a report that is honest."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tests.support.factories import make_prefix, signal_set
from trimtab import scores
from trimtab.artifacts.prefix import save_prefix
from trimtab.cli.main import main
from trimtab.data.prompt import hash_to_fraction
from trimtab.data.questions import Question
from trimtab.detection import training
from trimtab.detection.detector import load_detector
from trimtab.detection.signals import compute_trace_features
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.jobs.collect.plan import build_plan
from trimtab.jobs.collect.signal_dataset import begin_dataset, read_dataset
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.detect.training_free import build_score_inputs
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client

pytestmark = pytest.mark.usefixtures("cluster", "home")

LAYERS = (20, 29)


@pytest.fixture(scope="module")
def signals(base, tmp_path_factory):
    return signal_set(tmp_path_factory.mktemp("signals") / "made", base, LAYERS)


def test_a_data_set_is_read_as_it_was_written_and_named_by_its_rows(signals, base):
    data = read_dataset(signals, base)
    assert data.psi.shape == (400, 2, 3 * base.width)
    assert data.traces[0].shape == (4, 3)
    assert data.truthful.isnan().sum() == 40
    assert data.digest == read_dataset(signals).digest
    assert len(begin_dataset(signals, data.meta)) == 400


def test_what_is_no_data_set_or_of_another_model_is_refused(signals, base, tmp_path):
    with pytest.raises(ArtifactError, match="trimtab collect"):
        read_dataset(tmp_path)
    meta = read_dataset(signals).meta
    (tmp_path / "dataset.json").write_text(json.dumps(meta.__dict__ | {"fingerprint": "f" * 16}))
    with pytest.raises(ArtifactError, match=f"not of {base.name}"):
        read_dataset(tmp_path, base)
    with pytest.raises(UsageError, match="another fingerprint"):
        begin_dataset(tmp_path, meta)
    (tmp_path / "dataset.json").write_text(json.dumps(meta.__dict__))
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ArtifactError, match="not a whole Parquet file"):
        read_dataset(tmp_path)


def test_parts_of_another_model_are_told_and_an_answer_counts_once(base, tmp_path):
    folder = signal_set(tmp_path / "one", base, LAYERS)
    one = read_dataset(folder)
    part = next(folder.glob("part-*"))
    shutil.copy(part, folder / "part-again.parquet")
    assert read_dataset(folder).digest == one.digest
    other = signal_set(tmp_path / "other", replace(base, fingerprint="f" * 16), LAYERS, seed=1)
    shutil.copy(next(other.glob("part-*")), folder / "part-other.parquet")
    for look in (lambda: read_dataset(folder), lambda: begin_dataset(folder, one.meta)):
        with pytest.raises(ArtifactError, match=r"part-other\.parquet does not match the model"):
            look()


def test_few_groups_that_leave_nothing_to_learn_from_are_told(signals):
    data = read_dataset(signals)
    seed = next(s for s in range(1000) if hash_to_fraction("one", s) < 0.25)
    with pytest.raises(UsageError, match=f"seed {seed} leaves no answers to train on: the data set has 1 groups"):
        training.split_data(data.psi, data.traces, data.truthful, ["one"] * 400, seed, 0.1, 0.25)


def test_no_question_is_on_two_sides_and_test_rows_shape_nothing(signals):
    data = read_dataset(signals)
    questions = [f"Question {i // 2}?" for i in range(400)]
    rows = training.split_data(data.psi, data.traces, data.truthful, questions, 0, 0.1, 0.25)
    sides = {questions[i] for i in rows.test_indices.tolist()}
    assert len(rows.test) + len(rows.validation) + len(rows.train) <= 400
    assert all(questions[i ^ 1] in sides for i in rows.test_indices.tolist())
    changed = [t.clone() for t in data.traces]
    for i in rows.test_indices.tolist():
        changed[i] -= 100
    again = training.split_data(data.psi, changed, data.truthful, questions, 0, 0.1, 0.25)
    assert again.low == rows.low
    assert torch.equal(again.normalizer, rows.normalizer)


def test_a_detector_is_learned_chosen_saved_and_gives_risks(signals, base, tmp_path):
    config = DetectConfig(
        str(signals), "flag", {"groups": [2, 4], "projection": 32, "hidden": 32}, num_seeds=2, out=str(tmp_path / "detector")
    )
    made = train_detectors(config)
    (flag, *scored), figures, folder = made.results, made.figures, made.folder
    assert figures[0].auroc.low < flag.auroc < figures[0].auroc.high
    assert flag.auroc > 0.8
    assert flag.oracle >= flag.auroc
    assert {r.name for r in scored} == {"perplexity", "min-logprob", "entropy", "max-entropy", "margin"}
    assert all(0.3 < r.auroc < 0.7 for r in scored)
    assert all(r.tokens == 0 for r in (flag, *scored))
    made = load_detector(folder, base)
    assert made.card.metrics["test_auroc"] == flag.auroc
    data = read_dataset(signals)
    seen = data.psi[:, [data.meta.layers.index(layer) for layer in made.card.layers]]
    phi = torch.stack([compute_trace_features(*t.T, made.card.low_log_probability) for t in data.traces])
    risk = made.compute_risk(seen, phi)
    assert risk[data.truthful == 0].mean() > risk[data.truthful == 1].mean() + 0.1


def test_a_detector_is_registered_and_becomes_champion_where_it_is_better(signals, base, tmp_path, capsys):
    given = [
        "detect",
        "--signals",
        str(signals),
        "--head",
        "linear",
        "--layers",
        "[29]",
        "--num_seeds",
        "2",
        "--name",
        "made-up",
    ]
    assert main([*given, "--json", str(tmp_path / "first.json")]) == 0
    first = json.loads((tmp_path / "first.json").read_text())
    low, high = first["test"]["interval"]
    assert 0.5 < low <= first["test"]["auroc"] <= high <= 1
    assert len(first["seeds"]) == 2
    assert {"perplexity", "entropy"} < {arm["name"] for arm in first["rivals"]}
    assert first["version"]["aliases"] == ["candidate", "champion"]
    assert "promoted to champion" in first["gate"]
    version = registry.find_version(base.name, "made-up")
    assert registry.load_detector(version, base).card.run_id == version.run_id
    assert get_client().get_run(version.run_id).info.status == "FINISHED"
    with pytest.raises(NotFoundError, match="'made-up' of smollm2-135m is a detector, not a prefix"):
        registry.load_prefix(version)
    # The same data and seeds: nothing is gained.
    assert main([*given, "--json", str(tmp_path / "second.json")]) == 0
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["version"]["aliases"] == ["candidate"]
    assert "is not above champion v1" in second["gate"]
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "detector" in capsys.readouterr().out
    assert main(["show", "made-up"]) == 0
    assert '"head": "linear"' in capsys.readouterr().out


def test_a_name_is_of_one_kind(signals, frozen, base, tmp_path):
    taken = save_prefix(make_prefix(frozen, base, "taken", 1, "system", 1), tmp_path / "taken")
    registry.register_version(taken, runs.start_run("taken", "align", tmp_path / "outbox").run_id)
    with pytest.raises(UsageError, match="already has a prefix named 'taken': give the detector another --name"):
        train_detectors(DetectConfig(str(signals), "linear", layers=[29], num_seeds=1, name="taken"))


def test_fewer_labels_leave_the_rest_unlabelled(signals):
    data = read_dataset(signals)
    half = training.split_data(data.psi, data.traces, data.truthful, data.questions, 0, 0.1, 0.25, labels=0.5)
    whole = training.split_data(data.psi, data.traces, data.truthful, data.questions, 0, 0.1, 0.25)
    assert len(half.train) == len(whole.train)
    assert 0.35 < len(half.train.labelled) / len(whole.train.labelled) < 0.65


def test_settings_that_cannot_be_are_refused_in_one_line(signals):
    with pytest.raises(UsageError, match="must leave some answers"):
        DetectConfig("x", test_fraction=0.9, validation_fraction=0.1)
    with pytest.raises(UsageError, match="layer 7 was not collected"):
        train_detectors(DetectConfig(str(signals), layers=[7]))
    with pytest.raises(UsageError, match="--questions"):
        CollectConfig()
    with pytest.raises(UsageError, match="layers must be from 0 to 29"):
        collect(CollectConfig("trimtab:countries", "x", layers=[30]))


def test_a_question_is_asked_once():
    question = Question("What is the capital of France?", ("Paris",), "t")
    asked = build_plan(CollectConfig("x", "y"), [question, question, Question("And of Spain?", ("Madrid",), "t")])
    assert len({a.key for a in asked}) == 2
    with pytest.raises(UsageError, match="there are no questions or answers"):
        build_plan(CollectConfig("x", "y"), [])


def test_questions_are_answered_labelled_and_gone_on_with(base, tmp_path, capsys):
    """Two questions, then all of four: only what is missing is asked."""
    capitals = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Chad": "N'Djamena"}
    lines = [{"question": f"What is the capital of {c}?", "answers": [a]} for c, a in capitals.items()]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"questions": str(tmp_path / "q.jsonl"), "out": str(tmp_path / "out"), "dtype": "fp32", "max_tokens": 12}
    config |= {"num_samples": 3, "p_true": True}
    collect(CollectConfig(**config, limit=2))
    assert "2/2" in capsys.readouterr().out
    collect(CollectConfig(**config))
    assert "answers with signals: 2/2" in capsys.readouterr().out
    data = read_dataset(tmp_path / "out", base)
    assert data.meta.layers == (20, 29)
    assert len(data.keys) == 4
    assert all(math.isfinite(value) for value in data.psi.sum((1, 2)).tolist())
    by_question = dict(zip(data.questions, data.truthful.tolist(), strict=True))
    assert by_question["What is the capital of France?"] == 1
    for seen in build_score_inputs(data):
        assert len({s.text for s in seen.samples}) > 1
        assert all(1 <= s.tokens <= 12 and s.logp < 0 and s.state.shape == (2, base.width) for s in seen.samples)
        assert 0 < seen.p_true < 1
    assert len({seen.p_true for seen in build_score_inputs(data)}) > 1
    assert {"p-true", "eigenscore", "semantic-entropy"} < set(scores.list_computable(build_score_inputs(data)))
    collect(CollectConfig(**config))
    assert "answers with signals" not in capsys.readouterr().out
    for changed in ({"max_tokens": 13}, {"num_samples": 4}, {"temperature": 0.5}, {"p_true": False}):
        with pytest.raises(UsageError, match="different settings"):
            collect(CollectConfig(**config | changed))

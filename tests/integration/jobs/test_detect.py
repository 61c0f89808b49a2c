"""Collection of signals and training of detectors on them."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tests.support.factories import (
    compute_prompt_states,
    make_prefix,
    write_label_dataset,
    write_prompt_dataset,
    write_signal_dataset,
)
from trimtab import scores
from trimtab.artifacts.prefix import save_prefix
from trimtab.cli.main import main
from trimtab.data.prompt import hash_to_fraction
from trimtab.data.questions import Question
from trimtab.detection import training
from trimtab.detection.detector import load_detector
from trimtab.detection.signal_dataset import read_dataset
from trimtab.detection.signal_files import begin_dataset, metadata_as_json
from trimtab.detection.signals import CHECK_INTERVAL, WINDOW, compute_trace_features
from trimtab.errors import ArtifactError, NotFoundError, UsageError
from trimtab.generation_types import Conversation
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.jobs.collect.plan import build_plan
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.detect.report import evaluate_detectors
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.jobs.detect.training_free import build_score_inputs
from trimtab.model.chat_template import build_renderer
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client

pytestmark = pytest.mark.usefixtures("cluster", "home")

LAYERS = (20, 29)


@pytest.fixture(scope="module")
def signal_folder(base, tmp_path_factory):
    return write_signal_dataset(tmp_path_factory.mktemp("signals") / "made", base, LAYERS)


def test_dataset_is_read_as_written(signal_folder, base):
    data = read_dataset(signal_folder, base)
    assert data.psi.shape == (400, 2, 3 * base.width)
    assert data.traces[0].shape == (4, 3)
    assert data.truthful.isnan().sum() == 40
    assert data.digest == read_dataset(signal_folder).digest
    assert len(begin_dataset(signal_folder, data.meta)) == 400


def test_rejects_missing_foreign_and_truncated_datasets(signal_folder, base, tmp_path):
    with pytest.raises(ArtifactError, match="trimtab collect"):
        read_dataset(tmp_path)
    meta = read_dataset(signal_folder).meta
    (tmp_path / "dataset.json").write_text(json.dumps(metadata_as_json(meta) | {"fingerprint": "f" * 16}))
    with pytest.raises(ArtifactError, match=f"not of {base.name}"):
        read_dataset(tmp_path, base)
    with pytest.raises(UsageError, match="different fingerprint"):
        begin_dataset(tmp_path, meta)
    (tmp_path / "dataset.json").write_text(json.dumps(metadata_as_json(meta)))
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ArtifactError, match="not a whole Parquet file"):
        read_dataset(tmp_path)


def test_duplicate_rows_count_once_and_foreign_parts_are_rejected(base, tmp_path):
    folder = write_signal_dataset(tmp_path / "one", base, LAYERS)
    dataset = read_dataset(folder)
    part = next(folder.glob("part-*"))
    shutil.copy(part, folder / "part-again.parquet")
    assert read_dataset(folder).digest == dataset.digest
    foreign_folder = write_signal_dataset(tmp_path / "other", replace(base, fingerprint="f" * 16), LAYERS, seed=1)
    shutil.copy(next(foreign_folder.glob("part-*")), folder / "part-other.parquet")
    for read in (lambda: read_dataset(folder), lambda: begin_dataset(folder, dataset.meta)):
        with pytest.raises(ArtifactError, match=r"part-other\.parquet does not match the model"):
            read()


def test_rejects_split_without_training_answers(signal_folder):
    data = read_dataset(signal_folder)
    seed = next(candidate for candidate in range(1000) if hash_to_fraction("one", candidate) < 0.25)
    with pytest.raises(UsageError, match=f"seed {seed} leaves no answers to train on: the data set has 1 groups"):
        training.split_data(data.psi, data.traces, data.truthful, ["one"] * 400, seed, 0.1, 0.25)


def test_split_is_by_question_and_ignores_test_rows(signal_folder):
    data = read_dataset(signal_folder)
    questions = [f"Question {index // 2}?" for index in range(400)]
    rows = training.split_data(data.psi, data.traces, data.truthful, questions, 0, 0.1, 0.25)
    test_questions = {questions[index] for index in rows.test_indices.tolist()}
    assert len(rows.test) + len(rows.validation) + len(rows.train) <= 400
    assert all(questions[index ^ 1] in test_questions for index in rows.test_indices.tolist())
    changed = [trace.clone() for trace in data.traces]
    for index in rows.test_indices.tolist():
        changed[index] -= 100
    changed_rows = training.split_data(data.psi, changed, data.truthful, questions, 0, 0.1, 0.25)
    assert changed_rows.low == rows.low
    assert torch.equal(changed_rows.normalizer, rows.normalizer)


def test_trained_detector_separates_answers(signal_folder, base, tmp_path):
    config = DetectConfig(
        str(signal_folder),
        "flag",
        {"groups": [2, 4], "projection": 32, "hidden": 32},
        num_seeds=2,
        out=str(tmp_path / "detector"),
    )
    report = train_detectors(config)
    (flag, *score_results), figures, folder = report.results, report.figures, report.folder
    assert figures[0].auroc.low < flag.auroc < figures[0].auroc.high
    assert flag.auroc > 0.8
    assert flag.oracle >= flag.auroc
    assert {result.name for result in score_results} == {"perplexity", "min-logprob", "entropy", "max-entropy", "margin"}
    assert all(0.3 < result.auroc < 0.7 for result in score_results)
    assert all(result.tokens == 0 for result in (flag, *score_results))
    detector = load_detector(folder, base)
    assert detector.card.metrics["test_auroc"] == flag.auroc
    data = read_dataset(signal_folder)
    psi = data.psi[:, [data.meta.layers.index(layer) for layer in detector.card.layers]]
    features = torch.stack([compute_trace_features(*trace.T, detector.card.low_log_probability) for trace in data.traces])
    risk = detector.compute_risk(psi, features)
    assert risk[data.truthful == 0].mean() > risk[data.truthful == 1].mean() + 0.1


def test_better_detector_becomes_champion(signal_folder, base, tmp_path, capsys):
    command = [
        "detect",
        "--signals",
        str(signal_folder),
        "--head",
        "linear",
        "--layers",
        "[29]",
        "--num_seeds",
        "2",
        "--name",
        "made-up",
    ]
    assert main([*command, "--json", str(tmp_path / "first.json")]) == 0
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
    # The same data and seeds give no improvement.
    assert main([*command, "--json", str(tmp_path / "second.json")]) == 0
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["version"]["aliases"] == ["candidate"]
    assert "is not above champion v1" in second["gate"]
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "detector" in capsys.readouterr().out
    assert main(["show", "made-up"]) == 0
    assert '"head": "linear"' in capsys.readouterr().out


def test_unfinished_answers_calibrate_stops(base, tmp_path, capsys):
    """Each answer has four tokens, so that the risk at its only check is its own: stops flag what the thresholds flag."""
    folder = write_signal_dataset(tmp_path / "signals", base, LAYERS, unfinished=True)
    config = DetectConfig(str(folder), "linear", num_seeds=2, out=str(tmp_path / "out"), register=False)
    result = train_detectors(config)
    card = load_detector(tmp_path / "out", base).card
    assert card.stop_thresholds == pytest.approx(card.thresholds, abs=5e-3)
    assert [stop.level for stop in result.stops] == ["0.01", "0.05", "0.1"]
    stops = result.stops[-1]
    assert (stops.tokens, stops.length) == (4, 4)
    assert stops.right_stopped.value < 0.3
    assert stops.made_up_stopped.value > 0.7
    assert result.as_json()["stops"][0]["threshold"] == card.stop_thresholds["0.01"]
    main(["detect", "--signals", str(folder), "--head", "linear", "--num_seeds", "1", "--register", "false"])
    assert "made-up answers stopped" in capsys.readouterr().out


def test_windows_reveal_what_the_mean_hides(base, tmp_path):
    folders = [str(write_prompt_dataset(tmp_path / str(seed), base, LAYERS, seed, windows=True)) for seed in (1, 2)]
    config = DetectConfig(folders[0], "linear", test_signals=folders[1], num_seeds=2, name="guard", register=False)
    aurocs = []
    for windows in (False, True):
        result = train_detectors(replace(config, windows=windows, out=str(tmp_path / "out")))
        assert load_detector(tmp_path / "out", base).card.windows == windows
        aurocs.append(result.others[0].auroc)
    assert aurocs[0].high < aurocs[1].low
    with pytest.raises(UsageError, match="windows are those of prompts"):
        train_detectors(DetectConfig(str(write_signal_dataset(tmp_path / "answers", base, LAYERS)), "linear", windows=True))


def test_several_labels_give_one_artifact(base, tmp_path, capsys):
    """Each label has its own head and thresholds; the detector as a whole flags prompts with any label."""
    folder = write_label_dataset(tmp_path / "topics", base, LAYERS)
    train_detectors(DetectConfig(str(folder), "linear", num_seeds=2, name="topics", out=str(tmp_path / "out")))
    detector, data = load_detector(tmp_path / "out", base), read_dataset(folder)
    assert list(detector.card.label_thresholds) == ["cars", "food"]
    index = data.meta.layers.index(detector.card.layers[0])
    risks = {label: detector.select_label(label).score_prompts(data.psi[:, [index]]) for label in ("cars", "food", None)}
    assert torch.equal(risks[None], torch.stack([risks["cars"], risks["food"]]).max(0).values)
    for label in ("cars", "food"):
        wanted = torch.tensor([label in labels for labels in data.labels])
        threshold = detector.card.label_thresholds[label]["balanced"]
        assert ((risks[label] > threshold) == wanted).float().mean() > 0.8
    with pytest.raises(UsageError, match="has cars, food; not label 'tax'"):
        detector.select_label("tax")
    main(["detect", "--signals", str(folder), "--head", "linear", "--num_seeds", "1", "--register", "false"])
    assert "label food" in capsys.readouterr().out


def test_rejects_name_of_a_prefix(signal_folder, frozen, base, tmp_path):
    prefix_folder = save_prefix(make_prefix(frozen, base, "taken", 1, "system", 1), tmp_path / "taken")
    registry.register_version(prefix_folder, runs.start_run("taken", "align", tmp_path / "outbox").run_id)
    with pytest.raises(UsageError, match="already has a prefix named 'taken': give the detector another --name"):
        train_detectors(DetectConfig(str(signal_folder), "linear", layers=[29], num_seeds=1, name="taken"))


def test_label_fraction_removes_labels_only(signal_folder):
    data = read_dataset(signal_folder)
    half = training.split_data(data.psi, data.traces, data.truthful, data.questions, 0, 0.1, 0.25, labels=0.5)
    full = training.split_data(data.psi, data.traces, data.truthful, data.questions, 0, 0.1, 0.25)
    assert len(half.train) == len(full.train)
    assert 0.35 < len(half.train.labelled) / len(full.train.labelled) < 0.65


def test_rejects_invalid_settings(signal_folder):
    with pytest.raises(UsageError, match="must leave some answers"):
        DetectConfig("x", test_fraction=0.9, validation_fraction=0.1)
    with pytest.raises(UsageError, match="layer 7 was not collected"):
        train_detectors(DetectConfig(str(signal_folder), layers=[7]))
    with pytest.raises(UsageError, match="--questions"):
        CollectConfig()
    for options, message in (({"data": ""}, "--data FILE"), ({"p_true": True}, "generates no answers")):
        with pytest.raises(UsageError, match=message):
            CollectConfig(out="x", subject="prompt", **{"data": "trimtab:guard"} | options)
    with pytest.raises(UsageError, match="layers must be from 0 to 29"):
        collect(CollectConfig("trimtab:countries", "x", layers=[30]))


def test_plan_has_each_question_once():
    question = Question("What is the capital of France?", ("Paris",), "t")
    plan = build_plan(CollectConfig("x", "y"), [question, question, Question("And of Spain?", ("Madrid",), "t")])
    assert len({entry.key for entry in plan}) == 2
    with pytest.raises(UsageError, match="there are no rows"):
        build_plan(CollectConfig("x", "y"), [])


def test_collection_answers_labels_and_continues(base, tmp_path, capsys):
    """Two questions, then four: only the missing answers are generated."""
    capitals = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Chad": "N'Djamena"}
    lines = [{"question": f"What is the capital of {country}?", "answers": [capital]} for country, capital in capitals.items()]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"questions": str(tmp_path / "q.jsonl"), "out": str(tmp_path / "out"), "dtype": "fp32", "max_tokens": 12}
    config |= {"num_samples": 3, "p_true": True, "unfinished": True}
    collect(CollectConfig(**config, limit=2))
    assert "2/2" in capsys.readouterr().out
    collect(CollectConfig(**config))
    assert "answers with signals: 2/2" in capsys.readouterr().out
    data = read_dataset(tmp_path / "out", base)
    assert data.meta.layers == (20, 29)
    assert len(data.keys) == 4
    assert all(math.isfinite(value) for value in data.psi.sum((1, 2)).tolist())
    for trace, unfinished in zip(data.traces, data.unfinished, strict=True):
        assert unfinished.shape == (len(trace) // CHECK_INTERVAL, 2, 3 * base.width)
    by_question = dict(zip(data.questions, data.truthful.tolist(), strict=True))
    assert by_question["What is the capital of France?"] == 1
    for inputs in build_score_inputs(data):
        assert len({sample.text for sample in inputs.samples}) > 1
        assert all(
            1 <= sample.tokens <= 12 and sample.logp < 0 and sample.state.shape == (2, base.width) for sample in inputs.samples
        )
        assert 0 < inputs.p_true < 1
    assert len({inputs.p_true for inputs in build_score_inputs(data)}) > 1
    assert {"p-true", "eigenscore", "semantic-entropy"} < set(scores.list_computable(build_score_inputs(data)))
    collect(CollectConfig(**config))
    assert "answers with signals" not in capsys.readouterr().out
    for changed in ({"max_tokens": 13}, {"num_samples": 4}, {"temperature": 0.5}, {"p_true": False}, {"unfinished": False}):
        with pytest.raises(UsageError, match="different settings"):
            collect(CollectConfig(**config | changed))


def test_collected_prompt_states_equal_one_pass(base, frozen, tmp_path, capsys):
    """Prompts of a file, with a conversation and a system message; the engine's states equal those of one transformers pass."""
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    rows = [
        {"prompt": "How do I bake bread?", "class": "benign"},
        {"prompt": "How do I poison bread?", "class": "unsafe", "system": "You are a cook."},
        {"messages": [*turns, {"role": "user", "content": "How do I steal bread?"}], "class": "harmful"},
        {"prompt": "How do I bake bread?", "class": "benign"},
        {"prompt": f"How do I bake {'very ' * 150}good bread?", "class": "benign"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CollectConfig(subject="prompt", data=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "out"), dtype="fp32")
    collect(config)
    data = read_dataset(tmp_path / "out", base)
    assert (data.meta.subject, len(data.keys), len(data.meta.layers)) == ("prompt", 4, 4)
    renderer = build_renderer(base, 8)
    for row in (*rows[:3], rows[4]):
        messages = row.get("messages") or [
            *([{"role": "system", "content": row["system"]}] if "system" in row else []),
            {"role": "user", "content": row["prompt"]},
        ]
        index = data.questions.index(messages[-1]["content"])
        assert data.truthful[index] == (row["class"] == "benign")
        states = compute_prompt_states(frozen, renderer, Conversation(messages), data.meta.layers)
        expected = torch.cat([states[-1], states.mean(0), states[-1] - states.mean(0)], -1)
        assert (data.psi[index] - expected).norm() / expected.norm() < 1e-3
        if len(states) < 2 * WINDOW:
            assert data.windows[index] is None
        else:
            first, rest = states[:WINDOW].mean(0), states[WINDOW:].mean(0)
            assert (data.windows[index] - torch.stack([first, rest])).norm() / first.norm() < 1e-3
    assert len([window for window in data.windows if window is not None]) == 1
    assert "prompts with signals: 4/4" in capsys.readouterr().out
    collect(config)
    assert "prompts with signals" not in capsys.readouterr().out


def test_prompt_detector_is_measured_on_further_prompts(base, tmp_path, capsys):
    """A prompt detector has thresholds of the levels that its data supports, and no training-free rivals."""
    folders = [str(write_prompt_dataset(tmp_path / str(seed), base, LAYERS, seed)) for seed in (1, 2)]
    config = DetectConfig(folders[0], "linear", test_signals=folders[1], num_seeds=2, name="guard", out=str(tmp_path / "guard"))
    result = train_detectors(config)
    card = load_detector(tmp_path / "guard", base).card
    assert (card.subject, card.head_options) == ("prompt", {"parts": 2})
    # 5 of 0.05 need 100 benign prompts, and there are about 200.
    assert card.thresholds.keys() == {"0.05", "0.1", "balanced"}
    assert [r.name for r in result.results] == ["linear"]
    assert result.gate.endswith("over a constant (by point estimate); promoted to champion")
    (further,) = result.others
    assert "10 of 400 rows are in the training data and are left out" in capsys.readouterr().out.replace("\n", "")
    assert further.rates["balanced"].balanced.count == 390
    assert further.auroc.low > 0.9
    (own,) = result.out_of_fold
    for rate in ("0.05", "0.1"):
        assert own.rates[rate].passed.value == pytest.approx(1 - float(rate), abs=0.006)
        assert 1 - further.rates[rate].passed.value == pytest.approx(float(rate), abs=0.07)
    assert further.rates["balanced"].balanced.low > 0.8
    with pytest.raises(UsageError, match="are those of the training data"):
        train_detectors(replace(config, test_signals=folders[0]))
    with pytest.raises(UsageError, match="subject is answer, that of the training data is prompt"):
        train_detectors(replace(config, test_signals=str(write_signal_dataset(tmp_path / "answers", base, LAYERS))))
    with pytest.raises(UsageError, match="holds prompts, the report is on answers"):
        evaluate_detectors(TruthConfig(folders[0]))

"""Conditional prefixes in jobs: training on the prompts of one side, and the arms of `evaluate safety`."""

import json

import pytest

from tests.support.factories import make_prompt_detector
from tests.support.prompt_rows import BENIGN, HARMFUL, REFUSAL
from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.cli.main import main
from trimtab.detection.detector import Detector, save_detector
from trimtab.jobs.align.config import AlignConfig, DataConfig
from trimtab.jobs.align.dataset import read_raw_dataset
from trimtab.jobs.detect.guard import find_guard
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version

OPTIONS = {
    "train.max_steps": 2,
    "train.global_batch_size": 2,
    "train.micro_batch_size": 2,
    "train.dtype": "fp32",
    "evaluate.limit": 0,
    "evaluate.max_tokens": 3,
    "data.validation_fraction": 0.3,
    "data.test_fraction": 0.3,
    "data.system_prompt_fraction": 0.5,
    "data.filter_rules": "[]",
}
HARMFUL_TEXTS = [f"{text}{', please' * count}" for count in range(4) for text in HARMFUL]
BENIGN_TEXTS = [f"{text}{', please' * count}" for count in range(4) for text in BENIGN]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": text, "class": "harmful", "target": REFUSAL} for text in HARMFUL_TEXTS]
    rows += [{"prompt": text, "class": "benign", "target": "Of course! Here is all there is to know."} for text in BENIGN_TEXTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def tiny_guard(tiny_base, tmp_path_factory) -> Detector:
    """Champion `side` of the tiny base model, which flags half of the prompts."""
    frozen = FrozenModel(tiny_base.load("fp32"), build_renderer(tiny_base, 8).first_slot)
    folder = tmp_path_factory.mktemp("side")
    detector = make_prompt_detector(frozen, tiny_base, "side", (1,), [*HARMFUL_TEXTS, *BENIGN_TEXTS])
    run = runs.start_run("test", "detect", folder)
    promote_version(registry.register_version(save_detector(detector, folder / "side"), run.run_id), "test")
    run.finish("FINISHED")
    return detector


def test_conditional_prefix_is_trained_and_measured_on_its_side(cluster, tiny_base, tiny_guard, prompt_file, tmp_path, capsys):
    options = {
        "base": tiny_base.path,
        "name": "conditional",
        "data.harmful": prompt_file,
        "data.benign": prompt_file,
        **OPTIONS,
    }
    options |= {"condition.detector": "side", "condition.side": "below"}
    assert main(["align", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
    assert "condition: side@1 below" in capsys.readouterr().out
    (folder,) = (settings.get_runs_folder() / "conditional").glob("*")
    condition = load_prefix(folder / "prefix").card.condition
    assert condition is not None
    assert (condition.detector, condition.side) == ("side@1", "below")
    assert condition.threshold == tiny_guard.card.thresholds["balanced"]

    output = tmp_path / "safety.json"
    arguments = ["--base", str(tiny_base.path), "--data", prompt_file, "--prefix", "conditional@1", "--max_tokens", "3"]
    assert main(["evaluate", "safety", *arguments, "--dtype", "fp32", "--answers_file", str(output)]) == 0
    own = read_answers(output)
    guarded = ["--detector", "side", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "safety", *arguments, "--dtype", "fp32", "--answers_file", str(output), *guarded]) == 0
    arms = read_answers(output)
    names = ["base", "text prompt", "conditional@1", "guard", "conditional", "conditional help"]
    assert list(arms) == names
    flagged = [text.startswith("I cannot help") for text in arms["guard"]]
    assert {True, False} == set(flagged)
    columns = zip(flagged, *(arms[name] for name in names), own["conditional@1"], strict=True)
    for flag, plain, _, steered, guard, conditional, helped, side in columns:
        assert guard == (helped if flag else plain)
        assert conditional == (steered if flag else plain)
        assert helped == (guard if flag else steered)
        assert side == (plain if flag else steered)
    assert [arm["name"] for arm in json.loads((tmp_path / "out.json").read_text())["arms"]] == names

    # Questions on the other side have the base model's answers, and texts its scores.
    questions, output = tmp_path / "questions.jsonl", tmp_path / "utility.json"
    texts = [*HARMFUL_TEXTS, *BENIGN_TEXTS]
    questions.write_text("".join(json.dumps({"question": text, "answers": ["x"]}) + "\n" for text in texts))
    arguments = [
        "--base",
        str(tiny_base.path),
        "--questions",
        str(questions),
        "--texts",
        prompt_file,
        "--columns.text",
        "target",
    ]
    arguments += ["--prefix", "conditional@1", "--max_tokens", "3", "--dtype", "fp32", "--answers_file", str(output)]
    assert main(["evaluate", "utility", *arguments]) == 0
    measured = {arm["name"]: arm for arm in json.loads(output.read_text())["arms"]}
    answers = {name: {row["question"]: row["answer"] for row in arm["answers"]} for name, arm in measured.items()}
    for text, flag in zip(texts, flagged, strict=True):
        assert not flag or answers["conditional@1"][text] == answers["base"][text]
    assert answers["conditional@1"] != answers["base"]
    assert {text["kl"] > 0 for text in measured["conditional@1"]["texts"]} == {True, False}


def test_align_trains_a_guard_for_its_prefix(cluster, tiny_base, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    kinds = (("harmful", HARMFUL, REFUSAL), ("benign", BENIGN, "Of course! Here is all there is to know."))
    rows = [
        {"prompt": f"{texts[number % len(texts)]} This is number {number}.", "class": kind, "target": target}
        for kind, texts, target in kinds
        for number in range(130)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"base": tiny_base.path, "name": "guarded", "data.harmful": path, "data.benign": path, **OPTIONS}
    options["data.limit"] = 0
    assert main(["align", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
    (folder,) = (settings.get_runs_folder() / "guarded").glob("*")
    condition = load_prefix(folder / "prefix").card.condition
    assert (condition.detector, condition.side, condition.otherwise) == ("guarded-guard@1", "below", "refuse")
    assert registry.find_version(tiny_base.name, "guarded-guard", "candidate").kind == "detector"
    report = json.loads((folder / "report.json").read_text())
    (prefix,) = [arm for arm in report["test"]["arms"] if arm["name"] == "guarded"]
    assert prefix["refusal"] > 0.5
    assert "condition: guarded-guard@1 below" in capsys.readouterr().out
    # Another job on the same prompts uses the same guard.
    fractions = {name: OPTIONS[f"data.{name}"] for name in ("validation_fraction", "test_fraction")}
    config = AlignConfig(data=DataConfig(str(path), str(path), limit=0, **fractions))
    prompts = [prompt for listed in read_raw_dataset(config, tiny_base).parts.values() for prompt in listed]
    assert find_guard(tiny_base, "guarded-guard", prompts).version == 1
    assert find_guard(tiny_base, "guarded-guard", prompts[1:]) is None


def test_few_prompts_train_no_guard(cluster, tiny_base, prompt_file, capsys):
    options = {"base": tiny_base.path, "name": "unguarded", "data.harmful": prompt_file, "data.benign": prompt_file, **OPTIONS}
    assert main(["align", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
    assert "a guard needs 100" in capsys.readouterr().out
    (folder,) = (settings.get_runs_folder() / "unguarded").glob("*")
    assert load_prefix(folder / "prefix").card.condition is None


def test_study_has_guarded_arms(cluster, tiny_base, tiny_guard, prompt_file, tmp_path):
    options = {"base": str(tiny_base.path), "data.harmful": prompt_file, "data.benign": prompt_file, **OPTIONS}
    options["data.filter_rules"] = []
    config = {"name": "guarded", "seeds": [0], "shared": options, "arms": {"plain": {"objective": "likelihood"}}}
    config |= {"random_baseline": False, "detector": "side", "out": str(tmp_path / "report")}
    (tmp_path / "study.yaml").write_text(json.dumps(config))
    assert main(["study", "--config", str(tmp_path / "study.yaml"), "--json", str(tmp_path / "out.json")]) == 0
    (part,) = json.loads((tmp_path / "out.json").read_text())["parts"].values()
    names = [arm["name"] for arm in part["arms"]]
    assert names == ["base", "text prompt", "plain#0", "guard", "conditional plain#0", "conditional help plain#0"]


def test_attacks_on_a_guard(cluster, tiny_base, tiny_guard, prompt_file, tmp_path, capsys):
    output = tmp_path / "guard.json"
    arguments = ["--base", str(tiny_base.path), "--data", prompt_file, "--detector", "side", "--dtype", "fp32"]
    assert main(["evaluate", "guard", *arguments, "--attacks", '["spelling", "two_turns"]', "--json", str(output)]) == 0
    results = {entry["name"]: entry for entry in json.loads(output.read_text())["attacks"]}
    assert list(results) == ["none", "spelling", "two_turns"]
    assert results["none"]["missed"]["value"] == 0
    for result in results.values():
        assert result["flagged"]["count"] == len(HARMFUL_TEXTS)
        assert result["false_alarms"]["count"] == len(BENIGN_TEXTS)
        assert result["answered"]["value"] <= 1 - result["flagged"]["value"] + 1e-9
    assert "verdict flipped" in capsys.readouterr().out


def read_answers(path) -> dict[str, list[str]]:
    return {arm["name"]: [entry["answer"] for entry in arm["answers"]] for arm in json.loads(path.read_text())["arms"]}

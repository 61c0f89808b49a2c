"""Where something comes from: chains of answers, versions and runs, printed and drawn; and what can be thrown away."""

import json
import os
import time

import pytest

from tests.support.factories import make_prefix, random_detector, signal_set
from trimtab import settings
from trimtab.artifacts.prefix import save_prefix
from trimtab.cli.main import main
from trimtab.detection.detector import save_detector
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessRecord
from trimtab.serve.record_sinks import open_sinks
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client
from trimtab.tracking.promotions import promote_version, record_decision
from trimtab.util.atomic_files import exclusive_lock

pytestmark = pytest.mark.usefixtures("home")

LAYERS = (20, 29)
ID = "5b1f0a9c"
DAY = 86_400


@pytest.fixture
def served(frozen, base, tmp_path):
    """A prefix and a detector, made by runs with data, promoted; and an answer that both had a part in."""
    run = runs.start_run("steer", "align", settings.get_home() / "outbox")
    run.log_inputs([{"name": "prompts.jsonl", "digest": "abc123", "rows": 7}], "training")
    run.log_params({"config": {"objective": "sta"}, "base_fingerprint": base.fingerprint})
    version = registry.register_version(
        save_prefix(make_prefix(frozen, base, "steer", 1, "system", 1), tmp_path / "p"), run.run_id
    )
    record_decision(version, True, "balanced 0.70")
    promote_version(version, "balanced 0.70")
    run.finish("FINISHED")
    watch = runs.start_run("truth", "detect", settings.get_home() / "outbox")
    registry.register_version(save_detector(random_detector(base, "truth", LAYERS), tmp_path / "d"), watch.run_id)
    notes = {"model": f"{base.name}:steer@1", "detector": "truth@1", "risk": 0.25, "tokens": 3}
    taken = open_sinks(ServeConfig(), "replica")
    taken(AccessRecord(ID, "/v1/chat/completions", 200, time.time_ns(), time.time_ns(), 0.1, notes, None, None))
    taken.stop()
    return run.run_id


def chain(what, folder, *more):
    assert main(["lineage", what, "--json", str(folder / "chain.json"), *more]) == 0
    return json.loads((folder / "chain.json").read_text())


def kinds(node):
    return [node["kind"], *[kind for source in node["of"] for kind in kinds(source)]]


@pytest.mark.parametrize("what", [f"chatcmpl-{ID}", ID])
def test_an_answer_leads_back_to_data_code_and_who_promoted_what(served, base, tmp_path, capsys, what):
    found = chain(what, tmp_path, "--html", str(tmp_path / "chain.html"))
    assert (found["kind"], found["facts"]["risk"], found["facts"]["model"]) == ("response", "0.250", base.name)
    prefix, watched = found["of"]
    assert (prefix["kind"], watched["kind"]) == ("prefix", "detector")
    assert prefix["facts"]["aliases"] == "candidate, champion"
    assert kinds(prefix) == ["prefix", "champion", "gate", "run", "data", "code"]
    promoted, gate, run = prefix["of"]
    assert promoted["facts"]["because"] == gate["facts"]["reason"] == "balanced 0.70"
    assert promoted["facts"]["by"]
    assert run["facts"]["objective"] == "sta"
    assert run["facts"]["base_fingerprint"] == base.fingerprint
    assert run["of"][0]["facts"] == {"for": "training", "digest": "abc123", "rows": "7"}
    page, shown = (tmp_path / "chain.html").read_text(), capsys.readouterr().out
    for said in (ID, "prompts.jsonl", "abc123", "steer@1", "truth@1", served):
        assert said in page
        assert said in shown.replace("\n", "")
    assert "http://" not in page
    assert "https://" not in page


def test_runs_versions_and_names(served, base, tmp_path, capsys):
    run = chain(served, tmp_path)
    assert run["facts"]["made"] == f"{base.name}.steer@1"
    assert [chain(what, tmp_path)["title"] for what in ("steer", "steer@1", "truth")] == [
        f"{base.name}:steer@1",
        f"{base.name}:steer@1",
        f"{base.name}:truth@1",
    ]
    for unknown in ("0" * 32, "chatcmpl-0", "nobody"):
        assert main(["lineage", unknown]) == 2
        said = capsys.readouterr().err
        assert unknown.removeprefix("chatcmpl-") in said
        assert said.count("\n") == 1


def test_a_run_keeps_what_code_it_was_of(tmp_path):
    run = runs.start_run("code", "align", tmp_path / "outbox")
    kept = {file.path for file in get_client().list_artifacts(run.run_id, "code")}
    assert "code/packages.txt" in kept
    tags = get_client().get_run(run.run_id).data.tags
    assert len(tags["trimtab.code.packages"]) == 16
    assert tags["trimtab.code.version"]


def test_only_what_nothing_refers_to_is_removed(frozen, base, tmp_path, capsys):
    old = time.time() - 30 * DAY
    used = registered(frozen, base, tmp_path)
    folders = {
        "kept": aligned("20260101-000000-000001", used, "done"),
        "unused": aligned("20260101-000000-000002", "0" * 32, "done"),
        "stopped": aligned("20260101-000000-000003", "0" * 32),
        "resumable": aligned("20260101-000000-000009", "0" * 32),
        "arm": aligned("sta#0", "0" * 32, "prefix/card.json"),
        "half": aligned("sta#1", "0" * 32, "prefix"),
        "unsent": aligned("20260101-000000-000005", "0" * 32, "done"),
        "worked on": aligned("20260101-000000-000006", "0" * 32),
    }
    waits(folders["unsent"] / "run.json")
    answers = signal_set(tmp_path / "answers", base, LAYERS)
    for path in (*settings.get_home().rglob("*"), answers, *answers.rglob("*")):
        os.utime(path, (old, old))
    young = aligned("20260101-000000-000000", "0" * 32, "done")
    given = ["gc", "--signals", str(answers), "--json", str(tmp_path / "gc.json")]
    with exclusive_lock(folders["worked on"]):
        assert main(given) == 0
    shown = json.loads((tmp_path / "gc.json").read_text())
    wasted = {entry["path"] for entry in shown["waste"]}
    trained = {str(folders[name] / "train") for name in ("kept", "arm")}
    assert wasted >= trained | {str(folders["unused"]), str(folders["stopped"]), str(answers)}
    safe = [young, *(folders[name] for name in ("resumable", "half", "unsent", "worked on"))]
    assert not any(path.startswith(str(folder)) for path in wasted for folder in safe)
    assert all(folder.exists() for folder in folders.values())
    assert "would remove" in capsys.readouterr().out
    assert main([*given, "--remove"]) == 0
    # A job was in there a moment ago.
    left = {"kept", "resumable", "arm", "half", "unsent", "worked on"}
    assert {name for name, folder in folders.items() if folder.exists()} == left
    assert not answers.exists()
    assert not (folders["kept"] / "train").exists()
    assert (folders["arm"] / "prefix").exists()
    assert registry.load_prefix(registry.find_version(base.name, "kept", "1"), base).card.name == "kept"
    assert main(["gc", "--json", str(tmp_path / "gc.json")]) == 0
    assert json.loads((tmp_path / "gc.json").read_text())["waste"] == []


def registered(frozen, base, tmp_path):
    """A version whose download nobody needs: no alias names it."""
    run = runs.start_run("kept", "align", settings.get_home() / "outbox")
    for seed in (1, 2):
        folder = save_prefix(make_prefix(frozen, base, "kept", 1, "system", seed), tmp_path / str(seed))
        registry.register_version(folder, run.run_id)
    registry.load_prefix(registry.find_version(base.name, "kept", "1"), base)
    run.finish("FINISHED")
    return run.run_id


def waits(path):
    """Let a file wait for MLflow to be back."""
    line = {"kind": "artifacts", "body": {"path": str(path), "under": ""}}
    (settings.get_home() / "outbox" / f"{'f' * 32}.outbox").write_text(json.dumps(line) + "\n")


def aligned(name, run_id, *ended):
    folder = settings.get_runs_folder() / "safety" / name
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "checkpoint").write_text("x" * 1000)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "config": {}}))
    for each in ended:
        (folder / each).mkdir(parents=True)
    return folder

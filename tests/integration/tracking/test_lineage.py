"""Lineage of answers, versions and runs, and removal of unreferenced artifacts."""

import json
import os
import time

import pytest

from tests.support.factories import make_prefix, make_random_detector, write_signal_dataset
from trimtab import settings
from trimtab.artifacts.prefix import save_prefix
from trimtab.cli.main import main
from trimtab.detection.detector import save_detector
from trimtab.jobs.gc.config import GcConfig
from trimtab.jobs.gc.job import find_unused, remove_unused
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessRecord
from trimtab.serve.record_sinks import open_sinks
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client
from trimtab.tracking.promotions import promote_version, record_decision
from trimtab.util.atomic_files import exclusive_lock

pytestmark = pytest.mark.usefixtures("home")

LAYERS = (20, 29)
ID, SERVER_ID = "5b1f0a9c", "0123456789abcdef0123456789abcdef"
DAY = 86_400


@pytest.fixture
def recorded_run_id(frozen, base, tmp_path):
    """Id of a run whose prefix was promoted. The prefix and a detector gave an answer that the access log has."""
    run = runs.start_run("steer", "align", settings.get_home() / "outbox")
    run.log_inputs([{"name": "prompts.jsonl", "digest": "abc123", "rows": 7}], "training")
    run.log_params({"config": {"objective": "sta"}, "base_fingerprint": base.fingerprint})
    version = registry.register_version(
        save_prefix(make_prefix(frozen, base, "steer", 1, "system", 1), tmp_path / "p"), run.run_id
    )
    record_decision(version, True, "balanced 0.70")
    promote_version(version, "balanced 0.70")
    run.finish("FINISHED")
    detector_run = runs.start_run("truth", "detect", settings.get_home() / "outbox")
    registry.register_version(save_detector(make_random_detector(base, "truth", LAYERS), tmp_path / "d"), detector_run.run_id)
    fields = {"model": f"{base.name}:steer@1", "detector": "truth@1", "risk": 0.25, "tokens": 3}
    write_record = open_sinks(ServeConfig(), "replica")
    write_record(
        AccessRecord(ID, SERVER_ID, "/v1/chat/completions", 200, time.time_ns(), time.time_ns(), 0.1, fields, None, None)
    )
    write_record.stop()
    return run.run_id


def read_lineage(subject, folder, *options):
    assert main(["lineage", subject, "--json", str(folder / "chain.json"), *options]) == 0
    return json.loads((folder / "chain.json").read_text())


def list_kinds(node):
    return [node["kind"], *[kind for source in node["of"] for kind in list_kinds(source)]]


@pytest.mark.parametrize("subject", [f"chatcmpl-{ID}", ID])
def test_answer_lineage_has_data_code_and_promotion(recorded_run_id, base, tmp_path, capsys, subject):
    lineage = read_lineage(subject, tmp_path, "--html", str(tmp_path / "chain.html"))
    assert (lineage["kind"], lineage["facts"]["risk"], lineage["facts"]["model"]) == ("response", "0.250", base.name)
    prefix, detector = lineage["of"]
    assert (prefix["kind"], detector["kind"]) == ("prefix", "detector")
    assert prefix["facts"]["aliases"] == "candidate, champion"
    assert list_kinds(prefix) == ["prefix", "champion", "gate", "run", "data", "code"]
    promoted, gate, run = prefix["of"]
    assert promoted["facts"]["because"] == gate["facts"]["reason"] == "balanced 0.70"
    assert promoted["facts"]["by"]
    assert run["facts"]["objective"] == "sta"
    assert run["facts"]["base_fingerprint"] == base.fingerprint
    assert run["of"][0]["facts"] == {"for": "training", "digest": "abc123", "rows": "7"}
    page, output = (tmp_path / "chain.html").read_text(), capsys.readouterr().out
    for text in (ID, "prompts.jsonl", "abc123", "steer@1", "truth@1", recorded_run_id):
        assert text in page
        assert text in output.replace("\n", "")
    assert "http://" not in page
    assert "https://" not in page


def test_repeated_request_shows_the_answered_one(recorded_run_id, base, tmp_path):
    """Clients repeat a request with the same id after an error. A full disk leaves half a line."""
    (log,) = (settings.get_home() / "logs").glob("serve-*.jsonl")
    failed = json.loads(log.read_text()) | {"status": 503, "model": None, "at": "2999-01-01T00:00:00.000Z"}
    with log.open("a") as file:
        file.write(f'{{"id": "{ID}", "sta}}\n{json.dumps(failed)}\n{{"text": "{ID}"}}\n["{ID}"}}\n')
    lineage = read_lineage(ID, tmp_path)
    assert (lineage["facts"]["status"], lineage["facts"]["model"]) == ("200", base.name)
    assert lineage["facts"]["requests"].startswith("2 with this id")


def test_server_generated_id_finds_the_answer(recorded_run_id, base, tmp_path):
    assert read_lineage(SERVER_ID, tmp_path)["facts"]["model"] == base.name


def test_cycle_of_parent_runs_ends(recorded_run_id, tmp_path):
    get_client().set_tag(recorded_run_id, "mlflow.parentRunId", recorded_run_id)
    assert list_kinds(read_lineage(recorded_run_id, tmp_path)).count("run") == 1


def test_lineage_of_runs_and_versions(recorded_run_id, base, tmp_path, capsys):
    run = read_lineage(recorded_run_id, tmp_path)
    assert run["facts"]["made"] == f"{base.name}.steer@1"
    assert [read_lineage(subject, tmp_path)["title"] for subject in ("steer", "steer@1", "truth")] == [
        f"{base.name}:steer@1",
        f"{base.name}:steer@1",
        f"{base.name}:truth@1",
    ]
    for unknown in ("0" * 32, "chatcmpl-0", "nobody"):
        assert main(["lineage", unknown]) == 2
        error = capsys.readouterr().err
        assert unknown.removeprefix("chatcmpl-") in error
        assert error.count("\n") == 1


def test_run_records_code_and_packages(tmp_path):
    run = runs.start_run("code", "align", tmp_path / "outbox")
    paths = {file.path for file in get_client().list_artifacts(run.run_id, "code")}
    assert "code/packages.txt" in paths
    tags = get_client().get_run(run.run_id).data.tags
    assert len(tags["trimtab.code.packages"]) == 16
    assert tags["trimtab.code.version"]


def test_gc_removes_only_unreferenced_artifacts(frozen, base, tmp_path, capsys):
    month_ago = time.time() - 30 * DAY
    run_id = register_unused_version(frozen, base, tmp_path)
    folders = {
        "kept": create_run_folder("20260101-000000-000001", run_id, "done"),
        "unused": create_run_folder("20260101-000000-000002", "0" * 32, "done"),
        "stopped": create_run_folder("20260101-000000-000003", "0" * 32),
        "resumable": create_run_folder("20260101-000000-000009", "0" * 32),
        "arm": create_run_folder("sta#0", "0" * 32, "prefix/card.json"),
        "half": create_run_folder("sta#1", "0" * 32, "prefix"),
        "unsent": create_run_folder("20260101-000000-000005", "0" * 32, "done"),
        "worked on": create_run_folder("20260101-000000-000006", "0" * 32),
    }
    queue_for_upload(folders["unsent"] / "run.json")
    answers = write_signal_dataset(tmp_path / "answers", base, LAYERS)
    for path in (*settings.get_home().rglob("*"), answers, *answers.rglob("*")):
        os.utime(path, (month_ago, month_ago))
    recent = create_run_folder("20260101-000000-000000", "0" * 32, "done")
    command = ["gc", "--signals", str(answers), "--json", str(tmp_path / "gc.json")]
    with exclusive_lock(folders["worked on"]):
        assert main(command) == 0
    report = json.loads((tmp_path / "gc.json").read_text())
    unused = {entry["path"] for entry in report["waste"]}
    training_folders = {str(folders[name] / "train") for name in ("kept", "arm")}
    assert unused >= training_folders | {str(folders["unused"]), str(folders["stopped"]), str(answers)}
    protected = [recent, *(folders[name] for name in ("resumable", "half", "unsent", "worked on"))]
    assert not any(path.startswith(str(folder)) for path in unused for folder in protected)
    assert all(folder.exists() for folder in folders.values())
    assert "would remove" in capsys.readouterr().out
    assert main([*command, "--remove"]) == 0
    # The lock on one folder was held a moment ago, so that the folder stays.
    remaining = {"kept", "resumable", "arm", "half", "unsent", "worked on"}
    assert {name for name, folder in folders.items() if folder.exists()} == remaining
    assert not answers.exists()
    assert not (folders["kept"] / "train").exists()
    assert (folders["arm"] / "prefix").exists()
    assert registry.load_prefix(registry.find_version(base.name, "kept", "1"), base).card.name == "kept"
    assert main(["gc", "--json", str(tmp_path / "gc.json")]) == 0
    assert json.loads((tmp_path / "gc.json").read_text())["waste"] == []


def test_gc_leaves_a_folder_that_a_job_begins_to_use(home):
    folder = create_run_folder("20260101-000000-000001", "0" * 32, "done")
    (entry,) = find_unused(GcConfig(min_age_days=0))
    with exclusive_lock(folder):
        assert not remove_unused(entry)
    assert (folder / "run.json").exists()
    assert remove_unused(entry)
    assert not folder.exists()


def register_unused_version(frozen, base, tmp_path):
    """Register two versions, download the first, which has no alias, and return the id of their run."""
    run = runs.start_run("kept", "align", settings.get_home() / "outbox")
    for seed in (1, 2):
        folder = save_prefix(make_prefix(frozen, base, "kept", 1, "system", seed), tmp_path / str(seed))
        registry.register_version(folder, run.run_id)
    registry.load_prefix(registry.find_version(base.name, "kept", "1"), base)
    run.finish("FINISHED")
    return run.run_id


def queue_for_upload(path):
    """Write an outbox entry, so that the file counts as not yet uploaded."""
    entry = {"kind": "artifacts", "body": {"path": str(path), "under": ""}}
    (settings.get_home() / "outbox" / f"{'f' * 32}.outbox").write_text(json.dumps(entry) + "\n")


def create_run_folder(name, run_id, *markers):
    folder = settings.get_runs_folder() / "safety" / name
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "checkpoint").write_text("x" * 1000)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "config": {}}))
    for marker in markers:
        (folder / marker).mkdir(parents=True)
    return folder

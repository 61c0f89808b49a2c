"""Runs and registry on a SQLite store, and the tracking page."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from tests.support.factories import save_random_prefix
from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.errors import NotFoundError, TrackingError, UsageError
from trimtab.serve.registry import sources
from trimtab.serve.registry.sources import RegistryView
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client, wrap_tracking_errors
from trimtab.tracking.promotions import promote_version, rollback_version
from trimtab.util import ports


@pytest.fixture
def folder(tmp_path, base):
    return lambda name, seed: save_random_prefix(base, name, seed, tmp_path)


@pytest.fixture
def run(tmp_path):
    return runs.start_run("test", "align", tmp_path / "outbox")


def test_versions_aliases_promotion_and_rollback(folder, run, base):
    first = registry.register_version(folder("steer", 1), run.run_id)
    second = registry.register_version(folder("steer", 2), run.run_id)
    assert registry.find_version(base.name, "steer", "candidate").version == second.version
    with pytest.raises(NotFoundError, match=r"it has versions 2 \(candidate\), 1 \(no alias\)"):
        registry.find_version(base.name, "steer")
    promote_version(first, "because")
    with pytest.raises(NotFoundError, match="nothing to go back to"):
        rollback_version(base.name, "steer")
    assert promote_version(second, "better").version == first.version
    assert registry.find_version(base.name, "steer").version == second.version
    assert rollback_version(base.name, "steer").version == first.version
    assert registry.find_version(base.name, "steer").metrics["test_balanced"] == pytest.approx(0.7)
    assert torch.equal(registry.load_prefix(second, base).vectors, load_prefix(folder("steer", 2)).vectors)


def test_a_version_is_read_whole_while_others_download_it(folder, run, base):
    version = registry.register_version(folder("crowded", 1), run.run_id)
    expected = load_prefix(folder("crowded", 1)).vectors
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: registry.load_prefix(version, base).vectors, range(200)))
    assert all(torch.equal(vectors, expected) for vectors in read)


def test_a_version_that_was_read_is_read_again_while_the_store_is_away(folder, run, base, monkeypatch):
    read, unread = (registry.register_version(folder("afar", fill), run.run_id) for fill in (1, 2))
    expected = registry.load_prefix(read, base).vectors
    monkeypatch.setattr(registry, "get_client", lambda: raising(run.run_id, {}))
    assert torch.equal(registry.load_prefix(read, base).vectors, expected)
    with pytest.raises(TrackingError, match="away"):
        registry.load_prefix(unread, base)


def test_a_version_leads_back_to_its_run_and_model(folder, run, base):
    version = registry.register_version(folder("traced", 1), run.run_id)
    assert version.run_id == run.run_id
    found = get_client().get_model_version(registry.format_model_name(base.name, "traced"), str(version.version))
    model = get_client().get_logged_model(found.source.removeprefix("models:/"))
    assert model.source_run_id == run.run_id
    assert model.model_type == "trimtab-prefix"


def test_no_version_is_left_out_where_there_are_many(folder, run, base, monkeypatch):
    """Stores give a page at a time."""
    for seed in (1, 2):
        for name in ("many", "more"):
            registry.register_version(folder(name, seed), run.run_id)
    whole = registry.list_versions(base.name)
    monkeypatch.setattr(registry, "MODELS_PAGE", 1)
    monkeypatch.setattr(registry, "VERSIONS_PAGE", 1)
    assert registry.list_versions(base.name) == whole
    assert [(v.name, v.version) for v in whole if v.name in ("many", "more")] == [
        ("many", 2),
        ("many", 1),
        ("more", 2),
        ("more", 1),
    ]


def test_a_large_registry_is_read_where_something_changed(folder, run, base, monkeypatch):
    """And not once a second; what trimtab does to it shows at once."""
    first = registry.register_version(folder("read", 1), run.run_id)
    second = registry.register_version(folder("read", 2), run.run_id)
    held, reads, versions = RegistryView(base), [], registry.list_versions
    monkeypatch.setattr(sources, "READING", 1e-6)
    monkeypatch.setattr(registry, "list_versions", lambda *about: reads.append(1) or versions(*about))

    def champion():
        """The champion, and how often the registry was read for it."""
        reads.clear()
        names = {alias: v.version for v in held.list_versions("prefix") if v.name == "read" for alias in v.aliases}
        return names.get("champion"), len(reads)

    assert [champion(), champion()] == [(None, 1), (None, 0)]
    for version in (first, second):
        promote_version(version, "test")
        assert [champion(), champion()] == [(version.version, 1), (version.version, 0)]
    rollback_version(base.name, "read")
    assert champion() == (first.version, 1)
    assert held.list_versions("detector") == [v for v in versions(base.name) if v.kind == "detector"]


def test_names_that_could_be_taken_for_something_else():
    for name in ("a/b", "a:b", "a@b", "a.b", ""):
        with pytest.raises(UsageError, match="cannot be a name"):
            registry.format_model_name("base", name)
    with pytest.raises(NotFoundError, match="nothing named 'ghost'"):
        registry.find_version("smollm2-135m", "ghost")


def test_what_is_gone_or_damaged_does_not_hold_up_the_rest(run, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as away:
        away.setitem(runs.SEND, "artifacts", raising)
        run.log_artifacts(Path("file.txt"), "kept")
        run.log_artifacts(tmp_path / "gone.txt")
        run.set_tags({"after": "all"})
    monkeypatch.chdir("/")
    assert run.flush(patient=True) == 0
    assert run.flush() == 0
    assert [a.path for a in get_client().list_artifacts(run.run_id, "kept")] == ["kept/file.txt"]
    assert get_client().get_run(run.run_id).data.tags["after"] == "all"


def raising(run_id, body) -> None:
    raise TrackingError("away")


def test_an_address_is_shown_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:secret@db:5432/mlflow?x=1")
    assert settings.get_shown_uri() == "postgresql://db:5432/mlflow?x=1"
    with pytest.raises(TrackingError) as told, wrap_tracking_errors("look"):
        raise OSError(f"cannot reach {settings.get_tracking_uri()}")
    assert "secret" not in str(told.value)


def test_a_run_keeps_what_it_is_given(run, tmp_path):
    run.log_params({"train": {"max_steps": 3}, "name": "x"})
    run.log_params({"train": {"max_steps": 3}})
    run.log_metrics({"loss": 1.5}, 1)
    (tmp_path / "note.txt").write_text("hello")
    run.log_artifacts(tmp_path / "note.txt", "notes")
    run.log_inputs([{"name": "data.csv", "digest": "abc", "rows": 3}], "training")
    run.finish("FINISHED")
    found = get_client().get_run(run.run_id)
    assert found.data.params == {"train.max_steps": "3", "name": "x"}
    assert found.info.status == "FINISHED"
    assert found.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [a.path for a in get_client().list_artifacts(run.run_id, "notes")] == ["notes/note.txt"]
    assert run.flush(patient=True) == 0


@pytest.mark.slow
def test_ui_shows_the_store_in_use_until_it_is_ended(home, monkeypatch):
    runs.start_run("shown", "align", home / "outbox")
    port = ports.find_free_ports()[0]
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "trimtab", "ui", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert f"http://127.0.0.1:{port}/#/experiments/" in process.stdout.readline()
        deadline = time.monotonic() + 120
        while True:
            with suppress(httpx.HTTPError):
                asked = {"experiment_ids": [get_client().get_experiment_by_name("trimtab").experiment_id]}
                found = httpx.post(f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search", json=asked, timeout=5).json()
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
        assert [run["info"]["run_name"] for run in found["runs"]] == ["shown"]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

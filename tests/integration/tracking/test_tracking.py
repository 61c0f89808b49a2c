"""Runs and registry on a SQLite store, and the MLflow page that `trimtab ui` starts."""

import json
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
from trimtab.tracking import client, registry, runs
from trimtab.tracking.client import get_client, wrap_tracking_errors
from trimtab.tracking.promotions import promote_version, rollback_version
from trimtab.util import ports


@pytest.fixture
def save_prefix_version(tmp_path, base):
    return lambda name, seed: save_random_prefix(base, name, seed, tmp_path)


@pytest.fixture
def tracked_run(tmp_path):
    return runs.start_run("test", "align", tmp_path / "outbox")


def test_promotion_and_rollback_move_the_champion(save_prefix_version, tracked_run, base):
    first = registry.register_version(save_prefix_version("steer", 1), tracked_run.run_id)
    second = registry.register_version(save_prefix_version("steer", 2), tracked_run.run_id)
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
    assert torch.equal(registry.load_prefix(second, base).vectors, load_prefix(save_prefix_version("steer", 2)).vectors)


def test_concurrent_downloads_read_complete_versions(save_prefix_version, tracked_run, base):
    version = registry.register_version(save_prefix_version("crowded", 1), tracked_run.run_id)
    expected = load_prefix(save_prefix_version("crowded", 1)).vectors
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: registry.load_prefix(version, base).vectors, range(200)))
    assert all(torch.equal(vectors, expected) for vectors in loaded)


def test_downloaded_version_loads_while_the_store_is_unavailable(save_prefix_version, tracked_run, base, monkeypatch):
    loaded, not_loaded = (registry.register_version(save_prefix_version("afar", seed), tracked_run.run_id) for seed in (1, 2))
    expected = registry.load_prefix(loaded, base).vectors
    monkeypatch.setattr(registry, "get_client", lambda: raise_tracking_error(tracked_run.run_id, {}))
    assert torch.equal(registry.load_prefix(loaded, base).vectors, expected)
    with pytest.raises(TrackingError, match="away"):
        registry.load_prefix(not_loaded, base)


def test_version_refers_to_its_run_and_logged_model(save_prefix_version, tracked_run, base):
    version = registry.register_version(save_prefix_version("traced", 1), tracked_run.run_id)
    assert version.run_id == tracked_run.run_id
    model_version = get_client().get_model_version(registry.format_model_name(base.name, "traced"), str(version.version))
    model = get_client().get_logged_model(model_version.source.removeprefix("models:/"))
    assert model.source_run_id == tracked_run.run_id
    assert model.model_type == "trimtab-prefix"


def test_lists_all_versions_of_a_paged_store(save_prefix_version, tracked_run, base, monkeypatch):
    for seed in (1, 2):
        for name in ("many", "more"):
            registry.register_version(save_prefix_version(name, seed), tracked_run.run_id)
    versions = registry.list_versions(base.name)
    monkeypatch.setattr(registry, "MODELS_PAGE", 1)
    monkeypatch.setattr(registry, "VERSIONS_PAGE", 1)
    assert registry.list_versions(base.name) == versions
    assert [(version.name, version.version) for version in versions if version.name in ("many", "more")] == [
        ("many", 2),
        ("many", 1),
        ("more", 2),
        ("more", 1),
    ]


def test_large_registry_is_read_after_changes_only(save_prefix_version, tracked_run, base, monkeypatch):
    """The registry is read after a change only; changes by trimtab itself are visible at once."""
    first = registry.register_version(save_prefix_version("read", 1), tracked_run.run_id)
    second = registry.register_version(save_prefix_version("read", 2), tracked_run.run_id)
    view, reads, list_versions = RegistryView(base), [], registry.list_versions
    monkeypatch.setattr(sources, "READING", 1e-6)
    monkeypatch.setattr(registry, "list_versions", lambda *arguments: reads.append(1) or list_versions(*arguments))

    def read_champion():
        """Return the champion's version and the number of registry reads."""
        reads.clear()
        names = {
            alias: version.version
            for version in view.list_versions("prefix")
            if version.name == "read"
            for alias in version.aliases
        }
        return names.get("champion"), len(reads)

    assert [read_champion(), read_champion()] == [(None, 1), (None, 0)]
    for version in (first, second):
        promote_version(version, "test")
        assert [read_champion(), read_champion()] == [(version.version, 1), (version.version, 0)]
    rollback_version(base.name, "read")
    assert read_champion() == (first.version, 1)
    assert view.list_versions("detector") == [version for version in list_versions(base.name) if version.kind == "detector"]


def test_local_store_is_read_only_after_a_change_of_its_files(save_prefix_version, tracked_run, base, monkeypatch):
    """A client without trimtab moves an alias, which is visible although trimtab's time of the last change stays the same."""
    monkeypatch.setattr(client, "SETTLED_SECONDS", 0.0)
    version = registry.register_version(save_prefix_version("stamp", 1), tracked_run.run_id)
    view, queries, get_last_modified = RegistryView(base), [], registry.get_last_modified
    monkeypatch.setattr(registry, "get_last_modified", lambda name: queries.append(name) or get_last_modified(name))

    def list_aliases():
        queries.clear()
        (found,) = (version for version in view.list_versions("prefix") if version.name == "stamp")
        return set(found.aliases), len(queries)

    assert [list_aliases(), list_aliases()] == [({"candidate"}, 1), ({"candidate"}, 0)]
    client.get_client().set_registered_model_alias(registry.format_model_name(base.name, "stamp"), "other", version.version)
    monkeypatch.setattr(view, "_next", 0.0)
    assert [list_aliases(), list_aliases()] == [({"candidate", "other"}, 1), ({"candidate", "other"}, 0)]


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "a.b", "", " ", "bob's", 'the "best"', "top-5%", "two\nlines"])
def test_rejects_ambiguous_names(name):
    with pytest.raises(UsageError, match="cannot be a name") as error:
        registry.format_model_name("base", name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", ["smollm2:135m", "o'neil", "a/b"])
def test_rejects_ambiguous_base_models(base):
    with pytest.raises(UsageError, match="cannot be a base model"):
        registry.format_model_name(base, "mine")
    with pytest.raises(UsageError, match="cannot be a name"):
        registry.list_versions(base)


def test_unknown_name_is_not_found():
    with pytest.raises(NotFoundError, match="nothing named 'ghost'"):
        registry.find_version("smollm2-135m", "ghost")


def test_half_an_entry_of_a_power_failure_does_not_block_the_outbox(tracked_run, tmp_path):
    tracked_run.set_tags({"first": "1"})
    with (tmp_path / "outbox" / f"{tracked_run.run_id}.outbox").open("a") as file:
        file.write('{"kind": "tags", "bo')
    tracked_run.set_tags({"second": "2"})
    assert tracked_run.list_unsent() == []
    tags = get_client().get_run(tracked_run.run_id).data.tags
    assert (tags["first"], tags["second"]) == ("1", "2")


def test_missing_file_does_not_block_the_outbox(tracked_run, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as outage:
        outage.setitem(runs.SEND, "artifacts", raise_tracking_error)
        tracked_run.log_artifacts(Path("file.txt"), "kept")
        tracked_run.log_artifacts(tmp_path / "gone.txt")
        tracked_run.set_tags({"after": "all"})
    monkeypatch.chdir("/")
    assert tracked_run.flush(patient=True) == 0
    assert tracked_run.flush() == 0
    assert [artifact.path for artifact in get_client().list_artifacts(tracked_run.run_id, "kept")] == ["kept/file.txt"]
    assert get_client().get_run(tracked_run.run_id).data.tags["after"] == "all"


def test_rejected_entry_does_not_block_the_outbox(tracked_run, tmp_path, capsys):
    tracked_run.log_curves([{"step": 1, "a name with a ? in it": 1.0}])
    tracked_run.set_tags({"after": "all"})
    assert tracked_run.list_unsent() == []
    assert get_client().get_run(tracked_run.run_id).data.tags["after"] == "all"
    assert "MLflow rejected an entry (metrics)" in capsys.readouterr().out
    (entry,) = map(json.loads, (tmp_path / "outbox" / f"{tracked_run.run_id}.rejected").read_text().splitlines())
    assert entry["body"]["steps"][0]["values"] == {"a name with a ? in it": 1.0}


def test_run_goes_on_after_its_outbox_was_removed(tracked_run, tmp_path, monkeypatch):
    tracked_run.set_tags({"first": "1"})
    with monkeypatch.context() as outage:
        outage.setitem(runs.SEND, "tags", raise_tracking_error)
        tracked_run.set_tags({"second": "2"})
    assert not tracked_run.remove()
    assert tracked_run.flush(patient=True) == 0
    assert tracked_run.remove()
    assert {path.suffix for path in (tmp_path / "outbox").iterdir() if path.is_file()} == {".lock"}
    tracked_run.set_tags({"third": "3"})
    assert {"first", "second", "third"} <= get_client().get_run(tracked_run.run_id).data.tags.keys()


def test_simultaneous_promotions_replace_each_other(save_prefix_version, tracked_run, base):
    versions = [registry.register_version(save_prefix_version("race", seed), tracked_run.run_id) for seed in range(1, 6)]
    with ThreadPoolExecutor(5) as pool:
        previous = list(pool.map(lambda version: promote_version(version, "test"), versions))
    # Each version but the last champion was replaced exactly once.
    replaced = [version.version for version in previous if version is not None]
    champion = registry.find_version(base.name, "race").version
    assert sorted([*replaced, champion]) == [1, 2, 3, 4, 5]
    order = [champion]
    while len(order) < 5:
        order.append(previous[order[-1] - 1].version)
    assert rollback_version(base.name, "race").version == order[1]


def raise_tracking_error(run_id, body) -> None:
    raise TrackingError("away")


def test_errors_show_the_store_without_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:secret@db:5432/mlflow?x=1")
    assert settings.get_shown_uri() == "postgresql://db:5432/mlflow?x=1"
    with pytest.raises(TrackingError) as error, wrap_tracking_errors("look"):
        raise OSError(f"cannot reach {settings.get_tracking_uri()}")
    assert "secret" not in str(error.value)


def test_run_records_parameters_inputs_and_artifacts(tracked_run, tmp_path):
    tracked_run.log_params({"train": {"max_steps": 3}, "name": "x"})
    tracked_run.log_params({"train": {"max_steps": 3}})
    tracked_run.log_metrics({"loss": 1.5}, 1)
    (tmp_path / "note.txt").write_text("hello")
    tracked_run.log_artifacts(tmp_path / "note.txt", "notes")
    tracked_run.log_inputs([{"name": "data.csv", "digest": "abc", "rows": 3}], "training")
    tracked_run.finish("FINISHED")
    logged = get_client().get_run(tracked_run.run_id)
    assert logged.data.params == {"train.max_steps": "3", "name": "x"}
    assert logged.info.status == "FINISHED"
    assert logged.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [artifact.path for artifact in get_client().list_artifacts(tracked_run.run_id, "notes")] == ["notes/note.txt"]
    assert tracked_run.flush(patient=True) == 0


@pytest.mark.slow
def test_ui_serves_the_current_store_until_interrupted(home, monkeypatch):
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
                request = {"experiment_ids": [get_client().get_experiment_by_name("trimtab").experiment_id]}
                response = httpx.post(f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search", json=request, timeout=5).json()
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
        assert [run["info"]["run_name"] for run in response["runs"]] == ["shown"]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

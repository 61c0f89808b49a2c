"""An MLflow server, or its PostgreSQL, that is killed and comes back: no metric and no version is lost."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pgserver
import psutil
import pytest
import torch

from tests.support.factories import save_random_prefix
from tests.support.mlflow_server import MlflowServer
from trimtab.artifacts.prefix import load_prefix
from trimtab.errors import TrackingError
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client
from trimtab.tracking.promotions import promote_version, rollback_version


@pytest.fixture
def database():
    """A PostgreSQL of its own; not in pytest's folder, which is closed to the user that it runs as."""
    folder = tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True)
    with folder, pgserver.get_server(Path(folder.name) / "data") as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    """Where an MLflow server keeps what it is told."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/server.db"
    return request.getfixturevalue("database").get_uri().replace("postgresql://", "postgresql+psycopg2://")


def kill(pid: int) -> None:
    """A process and what it started, until they are gone."""
    gone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(gone, timeout=30)


@pytest.fixture
def server(store, tmp_path, monkeypatch):
    made = MlflowServer(store, tmp_path / "files")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    made.start()
    yield made
    made.kill()


def test_an_outage_loses_nothing(server, tmp_path):
    run = runs.start_run("outage", "align", tmp_path / "outbox")
    run.log_metrics({"loss": 3.0}, 1)
    server.kill()
    began = time.monotonic()
    for step in (2, 3, 4):
        run.log_metrics({"loss": 3.0 / step}, step)
    run.set_tags({"while": "away"})
    assert time.monotonic() - began < 30, "an outage must not hold the work up"
    assert run.flush() == 4
    with pytest.raises(TrackingError, match="cannot start a run"):
        runs.start_run("another", "align", tmp_path / "outbox")
    server.start()
    assert run.flush(patient=True) == 0
    run.finish("FINISHED")
    found = get_client().get_run(run.run_id)
    assert [m.step for m in get_client().get_metric_history(run.run_id, "loss")] == [1, 2, 3, 4]
    assert found.data.tags["while"] == "away"
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize("store", ["postgres"], indirect=True)
def test_versions_on_postgres_and_a_killed_one_loses_nothing(server, database, base, tmp_path):
    run = runs.start_run("postgres", "align", tmp_path / "outbox")
    versions = [registry.register_version(save_random_prefix(base, "kept", seed, tmp_path), run.run_id) for seed in (1, 2)]
    promote_version(versions[0], "first")
    promote_version(versions[1], "better")
    assert rollback_version(base.name, "kept").version == 1
    assert [v.version for v in registry.list_versions(base.name, "kept")] == [2, 1]
    assert registry.get_last_modified(base.name) > 0
    assert torch.equal(
        registry.load_prefix(versions[1], base).vectors, load_prefix(save_random_prefix(base, "kept", 2, tmp_path)).vectors
    )
    run.log_metrics({"loss": 1.0}, 1)
    kill(database.get_pid())
    run.log_metrics({"loss": 0.5}, 2)
    assert run.flush() == 1
    database.ensure_postgres_running()
    deadline = time.monotonic() + 60
    while run.flush(patient=True):
        assert time.monotonic() < deadline
    assert [m.step for m in get_client().get_metric_history(run.run_id, "loss")] == [1, 2]
    assert registry.find_version(base.name, "kept").version == 1

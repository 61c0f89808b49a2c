"""MLflow runs and versions while the MLflow server or its PostgreSQL is killed and restarted."""

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
def postgres():
    """PostgreSQL server. Its user has no access to pytest's folder, so that it needs another."""
    folder = tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True)
    with folder, pgserver.get_server(Path(folder.name) / "data") as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def backend_store_uri(request, tmp_path):
    """Backend store of the MLflow server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/server.db"
    return request.getfixturevalue("postgres").get_uri().replace("postgresql://", "postgresql+psycopg2://")


def kill_process_tree(pid: int) -> None:
    """Kill a process, and wait until it and its children have ended."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


@pytest.fixture
def tracking_server(backend_store_uri, tmp_path, monkeypatch):
    mlflow = MlflowServer(backend_store_uri, tmp_path / "files")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    mlflow.start()
    yield mlflow
    mlflow.kill()


def test_metrics_and_tags_survive_server_outage(tracking_server, tmp_path):
    run = runs.start_run("outage", "align", tmp_path / "outbox")
    run.log_metrics({"loss": 3.0}, 1)
    tracking_server.kill()
    began = time.monotonic()
    for step in (2, 3, 4):
        run.log_metrics({"loss": 3.0 / step}, step)
    run.set_tags({"while": "away"})
    assert time.monotonic() - began < 30, "an outage must not block the job"
    assert run.flush() == 4
    with pytest.raises(TrackingError, match="cannot start a run"):
        runs.start_run("another", "align", tmp_path / "outbox")
    tracking_server.start()
    assert run.flush(patient=True) == 0
    run.finish("FINISHED")
    logged = get_client().get_run(run.run_id)
    assert [metric.step for metric in get_client().get_metric_history(run.run_id, "loss")] == [1, 2, 3, 4]
    assert logged.data.tags["while"] == "away"
    assert logged.info.status == "FINISHED"


@pytest.mark.parametrize("backend_store_uri", ["postgres"], indirect=True)
def test_versions_and_metrics_survive_postgres_outage(tracking_server, postgres, base, tmp_path):
    run = runs.start_run("postgres", "align", tmp_path / "outbox")
    versions = [registry.register_version(save_random_prefix(base, "kept", seed, tmp_path), run.run_id) for seed in (1, 2)]
    promote_version(versions[0], "first")
    promote_version(versions[1], "better")
    assert rollback_version(base.name, "kept").version == 1
    assert [version.version for version in registry.list_versions(base.name, "kept")] == [2, 1]
    assert registry.get_last_modified(base.name) > 0
    assert torch.equal(
        registry.load_prefix(versions[1], base).vectors, load_prefix(save_random_prefix(base, "kept", 2, tmp_path)).vectors
    )
    run.log_metrics({"loss": 1.0}, 1)
    kill_process_tree(postgres.get_pid())
    run.log_metrics({"loss": 0.5}, 2)
    assert run.flush() == 1
    postgres.ensure_postgres_running()
    deadline = time.monotonic() + 60
    while run.flush(patient=True):
        assert time.monotonic() < deadline
    assert [metric.step for metric in get_client().get_metric_history(run.run_id, "loss")] == [1, 2]
    assert registry.find_version(base.name, "kept").version == 1

"""Serving with the registry on an MLflow server: links to runs, answers during an outage, and changes after it."""

import time
from collections.abc import Generator
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.support import browser
from tests.support.factories import QUESTIONS, make_prefix
from tests.support.mlflow_server import MlflowServer
from trimtab.artifacts.prefix import save_prefix
from trimtab.engine.config import EngineConfig
from trimtab.serve.config import ServeConfig
from trimtab.serve.server import serving
from trimtab.tracking import registry, runs
from trimtab.tracking.promotions import promote_version
from trimtab.util import ports

LIVE_SECONDS, START_SECONDS = 60, 240
# Part of the command line of a replica's process.
REPLICA = "ServeReplica:trimtab:engine"


@pytest.fixture(scope="module")
def registry_mlflow_server(tmp_path_factory) -> Generator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    server = MlflowServer(f"sqlite:///{folder}/server.db", folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        server.start()
        yield server
    server.kill()


@pytest.fixture(scope="module")
def registry_server_url(registry_mlflow_server, frozen, base, tmp_path_factory) -> Generator[str]:
    """URL of a server with two versions of a prefix; the first is champion."""
    folder = tmp_path_factory.mktemp("prefixes")
    run = runs.start_run("a run to be found", "align", folder / "outbox")
    for seed in (1, 2):
        version = registry.register_version(
            save_prefix(make_prefix(frozen, base, "kept", 1, "system", seed), folder / str(seed)), run.run_id
        )
        if seed == 1:
            promote_version(version, "test")
    engine = EngineConfig(num_slots=4, dtype="fp32", max_model_len=512)
    with serving(ServeConfig(port=ports.find_free_ports()[0], engine=engine, detect=False)) as url:
        yield url


def request_answer(url: str) -> tuple[str, dict]:
    """Return an answer and the prefix version that gave it."""
    request = {
        "model": "smollm2-135m:kept",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 8,
        "temperature": 0,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=60)
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["trimtab"]["prefix"]


@pytest.mark.skipif(browser.find_browser() is None, reason="no Chromium on this machine")
def test_page_links_to_mlflow_run(registry_server_url, registry_mlflow_server):
    _, prefix = request_answer(registry_server_url)
    link = httpx.get(f"{registry_server_url}/page.json").json()["runs"] + prefix["run_id"]
    assert link.startswith(registry_mlflow_server.uri)
    with browser.open_tab(link) as tab:
        tab.wait_until("document.body.innerText.includes('a run to be found')")


def test_serves_cached_versions_during_mlflow_outage(registry_server_url, registry_mlflow_server, base):
    text, prefix = request_answer(registry_server_url)
    assert prefix["version"] == 1
    registry_mlflow_server.kill()
    # Longer than two reads of the registry take.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert request_answer(registry_server_url) == (text, prefix)
    assert httpx.get(f"{registry_server_url}/v1/models", timeout=30).status_code == 200
    # A replica that starts during the outage uses the versions that its machine last read.
    (replica,) = (p for p in psutil.Process().children(recursive=True) if REPLICA in " ".join(p.cmdline()))
    replica.kill()
    assert wait_for_answer(registry_server_url) == (text, prefix)
    assert get_registry_read_time(registry_server_url) == 0
    registry_mlflow_server.start()
    promote_version(registry.find_version(base.name, "kept", "2"), "better")
    deadline = time.monotonic() + LIVE_SECONDS
    while request_answer(registry_server_url)[1]["version"] != 2:
        assert time.monotonic() < deadline
    assert get_registry_read_time(registry_server_url) > 0


def wait_for_answer(url: str) -> tuple[str, dict]:
    """Retry until the replacement of a dead replica answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            return request_answer(url)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def get_registry_read_time(url: str) -> float:
    """Return the time when the server last read its registry (seconds since 1970)."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    (line,) = (line for line in text.splitlines() if line.startswith("trimtab_registry_read_seconds"))
    return float(line.split()[-1])

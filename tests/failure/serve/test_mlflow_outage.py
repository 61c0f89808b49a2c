"""Serving with the registry on an MLflow server: links to runs, answers during an outage, and changes after it."""

import time
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.support import browser
from tests.support.factories import QUESTIONS
from trimtab.tracking import registry
from trimtab.tracking.promotions import promote_version

START_SECONDS = 240
# Part of the command line of a replica's process.
REPLICA = "ServeReplica:trimtab:engine"


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
def test_page_links_to_mlflow_run(replicated_server_url, registry_mlflow_server):
    _, prefix = request_answer(replicated_server_url)
    link = httpx.get(f"{replicated_server_url}/page.json").json()["runs"] + prefix["run_id"]
    assert link.startswith(registry_mlflow_server.uri)
    with browser.open_tab(link) as tab:
        tab.wait_until("document.body.innerText.includes('a run to be found')")


def test_serves_cached_versions_during_mlflow_outage(replicated_server_url, registry_mlflow_server, base):
    text, prefix = request_answer(replicated_server_url)
    assert prefix["version"] == 1
    registry_mlflow_server.kill()
    # Longer than two reads of the registry take.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert request_answer(replicated_server_url) == (text, prefix)
    assert httpx.get(f"{replicated_server_url}/v1/models", timeout=30).status_code == 200
    # Replicas that start during the outage use the versions that their machine last read.
    replicas = [p for p in psutil.Process().children(recursive=True) if REPLICA in " ".join(p.cmdline())]
    assert len(replicas) == 2
    for replica in replicas:
        replica.kill()
    assert wait_for_answer(replicated_server_url) == (text, prefix)
    assert set(get_registry_read_times(replicated_server_url)) == {0}
    registry_mlflow_server.start()
    promote_version(registry.find_version(base.name, "kept", "2"), "better")
    deadline = time.monotonic() + START_SECONDS
    # Both replicas, of which the second may still be starting.
    while len(times := get_registry_read_times(replicated_server_url)) < 2 or not all(times):
        assert time.monotonic() < deadline, times
        time.sleep(0.5)
    assert {request_answer(replicated_server_url)[1]["version"] for _ in range(8)} == {2}


def wait_for_answer(url: str) -> tuple[str, dict]:
    """Retry until the replacement of a dead replica answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            return request_answer(url)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def get_registry_read_times(url: str) -> list[float]:
    """Return when each replica last read its registry (seconds since 1970; 0 if it has not read it)."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return [float(line.split()[-1]) for line in text.splitlines() if line.startswith("trimtab_registry_read_seconds")]

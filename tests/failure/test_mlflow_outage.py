"""A server whose registry is a real MLflow server: links to it, answers while it is away, and what it says when it is back."""

import time
from collections.abc import Generator
from contextlib import suppress

import httpx
import psutil
import pytest

from bench.peers.serving_chaos import REPLICA
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


@pytest.fixture(scope="module")
def tracking(tmp_path_factory) -> Generator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    made = MlflowServer(f"sqlite:///{folder}/server.db", folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", made.uri)
        made.start()
        yield made
    made.kill()


@pytest.fixture(scope="module")
def url(tracking, frozen, base, tmp_path_factory) -> Generator[str]:
    """Two versions of a prefix, of which the first is champion."""
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


def asked(url: str) -> tuple[str, dict]:
    """An answer, and the version that gave it."""
    body = {
        "model": "smollm2-135m:kept",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["choices"][0]["message"]["content"], said["trimtab"]["prefix"]


@pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine")
def test_the_page_leads_to_the_run_in_mlflow(url, tracking):
    _, prefix = asked(url)
    link = httpx.get(f"{url}/page.json").json()["runs"] + prefix["run_id"]
    assert link.startswith(tracking.uri)
    with browser.opened(link) as tab:
        tab.until("document.body.innerText.includes('a run to be found')")


def test_what_is_loaded_is_served_while_mlflow_is_away_and_moves_when_it_is_back(url, tracking, base):
    text, prefix = asked(url)
    assert prefix["version"] == 1
    tracking.kill()
    # Longer than two looks at the registry take.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert asked(url) == (text, prefix)
    assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 200
    # One that starts meanwhile answers with what its machine last read.
    (replica,) = (p for p in psutil.Process().children(recursive=True) if REPLICA in " ".join(p.cmdline()))
    replica.kill()
    assert again(url) == (text, prefix)
    assert read_at(url) == 0
    tracking.start()
    promote_version(registry.find_version(base.name, "kept", "2"), "better")
    deadline = time.monotonic() + LIVE_SECONDS
    while asked(url)[1]["version"] != 2:
        assert time.monotonic() < deadline
    assert read_at(url) > 0


def again(url: str) -> tuple[str, dict]:
    """The first answer of a replica that takes a dead one's place."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            return asked(url)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def read_at(url: str) -> float:
    """When the server last read its registry, in seconds since 1970."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    (line,) = (line for line in text.splitlines() if line.startswith("trimtab_registry_read_seconds"))
    return float(line.split()[-1])

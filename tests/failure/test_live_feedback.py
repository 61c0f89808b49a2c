"""Stored signals and labels of a server whose replica is killed, or whose disk is full."""

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.commands import RunningCommand, can_mount, start_command
from trimtab.detection.live_labels import read_labels
from trimtab.util import ports

REPLICA = "ServeReplica:trimtab:engine"
NAMESPACE = ["unshare", "--mount"]
# The folder of the signals becomes a file system of 32 KiB, which few answers fill.
SMALL_DISK = 'mount -t tmpfs -o size=32k tmpfs "$1" && shift && exec "$@"'
ANSWERS = 120

pytestmark = pytest.mark.slow


def start_server(tiny_base, folder: Path, tmp_path: Path, *before: str) -> tuple[RunningCommand, str]:
    """Start a server that stores signals in a folder; return the command and the URL."""
    port = ports.find_free_ports()[0]
    options = ["serve", "--base", str(tiny_base.path), "--port", str(port), "--engine.max_model_len", "256"]
    options += ["--engine.layers", "[1]", "--keep_signals", str(folder), "--signals_flush_s", "0.2"]
    server = start_command(options, tmp_path / "log", before=before)
    server.wait_until(lambda: "press Ctrl-C to stop" in server.log.read_text())
    return server, f"http://127.0.0.1:{port}"


def stop_server(server: RunningCommand) -> None:
    server.process.terminate()
    server.process.wait(120)
    assert not server.find_remaining_processes()


async def send_answer(client: httpx.AsyncClient, model: str) -> str:
    """Send a request; return the request id of the server."""
    response = await client.post("/v1/completions", json={"model": model, "prompt": "Once", "max_tokens": 4})
    response.raise_for_status()
    return response.headers["x-trimtab-request-id"]


def test_acknowledged_labels_survive_a_killed_replica(home, tiny_base, tmp_path):
    folder = tmp_path / "signals"
    server, url = start_server(tiny_base, folder, tmp_path)
    acknowledged: set[str] = set()

    async def label_answers(client: httpx.AsyncClient, ids: list[str]) -> None:
        for request_id in ids:
            try:
                response = await client.post("/v1/feedback", json={"id": request_id, "correct": True})
            except httpx.HTTPError:
                return
            if response.status_code == 200:
                acknowledged.add(request_id)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            ids = [await send_answer(client, tiny_base.name) for _ in range(40)]
            labeling = asyncio.gather(*(label_answers(client, ids[start::4]) for start in range(4)))
            while len(acknowledged) < 8:
                await asyncio.sleep(0.001)
            children = psutil.Process(server.process.pid).children(recursive=True)
            (replica,) = [child for child in children if REPLICA in " ".join(child.cmdline())]
            replica.kill()
            await labeling

    asyncio.run(run())
    assert 8 <= len(acknowledged) < 40
    assert {label.id for label in read_labels(folder)} >= acknowledged
    stop_server(server)


@pytest.mark.skipif(not can_mount(NAMESPACE), reason="mount namespaces are not available")
def test_full_disk_loses_signals_but_no_answers(home, tiny_base, tmp_path):
    folder = tmp_path / "signals"
    folder.mkdir()
    server, url = start_server(tiny_base, folder, tmp_path, *NAMESPACE, "sh", "-euc", SMALL_DISK, "sh", str(folder))

    async def run() -> tuple[int, dict[str, float]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            ids = [await send_answer(client, tiny_base.name) for _ in range(ANSWERS)]
            while (counts := read_counts((await client.get("/metrics")).text)) and sum(counts.values()) < ANSWERS:
                await asyncio.sleep(0.05)
            labeled = await client.post("/v1/feedback", json={"id": ids[-1], "correct": False})
            return labeled.status_code, counts

    status, counts = asyncio.run(run())
    assert counts["stored"] + counts["lost"] == ANSWERS
    assert counts["lost"] > 0
    # A label is stored, or its client learns that it was not.
    assert status in (200, 503)
    stop_server(server)


def read_counts(metrics: str) -> dict[str, float]:
    """Read the numbers of stored and lost answers."""
    lines = [line.split() for line in metrics.splitlines()]
    return {
        kind: sum(float(line[-1]) for line in lines if line and line[0].startswith(f"trimtab_signals_{kind}_total"))
        for kind in ("stored", "lost")
    }

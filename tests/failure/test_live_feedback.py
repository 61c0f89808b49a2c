"""Stored signals and labels of a server whose replica or MLflow server is killed, or whose disk or bucket fails."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.commands import RunningCommand, can_mount, start_command
from tests.support.mlflow_server import MlflowServer
from trimtab.detection.live_labels import read_labels
from trimtab.util import ports

REPLICA = "ServeReplica:trimtab:engine"
NAMESPACE = ["unshare", "--mount"]
# The folder of the signals becomes a file system of 32 KiB, which few answers fill.
SMALL_DISK = 'mount -t tmpfs -o size=32k tmpfs "$1" && shift && exec "$@"'
ANSWERS = 120

pytestmark = pytest.mark.slow


def start_server(
    tiny_base, folder: Path | str, tmp_path: Path, *options: str, before=(), environment: Mapping[str, str] | None = None
) -> tuple[RunningCommand, str]:
    """Start a server that stores signals in a folder or bucket; return the command and the URL."""
    port = ports.find_free_ports()[0]
    command = ["serve", "--base", str(tiny_base.path), "--port", str(port), "--engine.max_model_len", "256"]
    command += ["--engine.layers", "[1]", "--keep_signals", str(folder), "--signals_flush_s", "0.2", *options]
    server = start_command(command, tmp_path / "log", environment, before)
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
    server, url = start_server(tiny_base, folder, tmp_path, before=(*NAMESPACE, "sh", "-euc", SMALL_DISK, "sh", str(folder)))

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


def test_unreachable_bucket_loses_signals_but_no_answers(home, tiny_base, tmp_path, object_store):
    bucket = object_store.create_bucket("trimtab-signals")
    server, url = start_server(tiny_base, bucket, tmp_path, environment=object_store.environment)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            first = await send_answer(client, tiny_base.name)
            while read_counts((await client.get("/metrics")).text)["stored"] < 1:
                await asyncio.sleep(0.05)
            object_store.stop()
            try:
                # `send_answer` fails on every response that is not an answer.
                lost = [await send_answer(client, tiny_base.name) for _ in range(8)]
                while read_counts((await client.get("/metrics")).text)["lost"] < 8:
                    await asyncio.sleep(0.05)
                refused = await client.post("/v1/feedback", json={"id": lost[0], "correct": True})
            finally:
                object_store.start()
            stored = await client.post("/v1/feedback", json={"id": first, "correct": True})
            assert refused.status_code == HTTPStatus.SERVICE_UNAVAILABLE, refused.text
            assert stored.status_code == HTTPStatus.OK, stored.text

    asyncio.run(run())
    stop_server(server)


def test_acknowledged_labels_survive_a_killed_mlflow_server(home, tiny_base, tmp_path, monkeypatch):
    folder = tmp_path / "signals"
    mlflow_server = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "files")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    mlflow_server.start()
    try:
        server, url = start_server(tiny_base, folder, tmp_path, "--trace_sampling_ratio", "1")

        async def run() -> set[str]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                ids = [await send_answer(client, tiny_base.name) for _ in range(20)]
                for number, request_id in enumerate(ids):
                    if number == len(ids) // 2:
                        mlflow_server.kill()
                    (await client.post("/v1/feedback", json={"id": request_id, "correct": True})).raise_for_status()
                return set(ids)

        acknowledged = asyncio.run(run())
        assert {label.id for label in read_labels(folder)} == acknowledged
        stop_server(server)
    finally:
        mlflow_server.kill()


def read_counts(metrics: str) -> dict[str, float]:
    """Read the numbers of stored and lost answers."""
    lines = [line.split() for line in metrics.splitlines()]
    return {
        kind: sum(float(line[-1]) for line in lines if line and line[0].startswith(f"trimtab_signals_{kind}_total"))
        for kind in ("stored", "lost")
    }

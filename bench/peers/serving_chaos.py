"""Killing what a server is made of, while it is asked: used by bench/chaos.py."""

import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pgserver
import psutil

from bench.peers import servers
from bench.peers.clients import OK, Clients, answers
from bench.peers.servers import Server, Up
from tests.support.mlflow_server import MlflowServer
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.model.base_model import resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client
from trimtab.tracking.promotions import promote_version
from trimtab.tracking.runs import TrackedRun

NAME, TOKENS, SLOTS, REPLICAS = "kept", 16, 8, 2
REPLICA = "ServeReplica:trimtab:engine"
# Where Serve's replicas listen for its HAProxy.
REPLICA_PORTS = range(30_000, 31_001)
TEXTS = ("What is the capital of France?", "Name three fruits.", "How do I boil an egg?", "Who wrote Hamlet?")
# A round is over when all went well for so long; what is not well again after this time never will be.
CALM_SECONDS, ROUND_SECONDS = 5.0, 300.0
WRITE_SECONDS, NOTICED_SECONDS = 0.25, 1.0


@dataclass(frozen=True)
class Store:
    """MLflow's server and the PostgreSQL behind it."""

    server: MlflowServer
    database: Any

    def kill_database(self) -> None:
        """PostgreSQL and all its processes."""
        process = psutil.Process(self.database.get_pid())
        there = [process, *process.children(recursive=True)]
        for each in there:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(there, timeout=30)


@dataclass
class Writer:
    """A job beside it all that logs a value again and again: what is lost would be missing in its curve."""

    run: TrackedRun
    steps: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self.ended.wait(WRITE_SECONDS):
            self.steps += 1
            self.run.log_metrics({"alive": float(self.steps)}, self.steps)

    def missing(self) -> int:
        """Values that are not in MLflow after all was sent."""
        self.ended.set()
        self._thread.join()
        wait(lambda: self.run.flush(patient=True) == 0)
        return self.steps - len(get_client().get_metric_history(self.run.run_id, "alive"))


@dataclass(frozen=True)
class Target:
    """A process to kill: what does so, and what starts it again where nothing else does."""

    name: str
    kill: Callable[[], Any]
    revive: Callable[[], Any] = lambda: None


def chaos(base_name: str, count: int, only: str | None) -> list[dict[str, Any]]:
    """Kill each of a server's processes so many times; what clients saw."""
    base, lines = resolve_base_model(base_name), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name, store(Path(name)) as kept:
        os.environ["MLFLOW_TRACKING_URI"] = kept.server.uri
        folder = Path(name)
        run = runs.start_run("chaos", "align", folder / "outbox")
        (made,) = servers.random_prefixes(base, folder / "made", 1, strength=4.0)
        prefix = build_prefix(made.vectors, replace(made.card, name=NAME))
        promote_version(registry.register_version(save_prefix(prefix, folder / "kept"), run.run_id), "first")
        sizes = f"--num_replicas {REPLICAS} --engine.num_slots {SLOTS} --engine.max_model_len 512".split()
        sizes += ["--engine.cpu_kv_cache_gib", "1"]
        with servers.running(Server("trimtab", servers.trimtab(base.name, *sizes, "--detect", "false"))) as up:
            right = answers(up.url, f"{base.name}:{NAME}", TEXTS, TOKENS)
            clients, writer = Clients(up.url, f"{base.name}:{NAME}", right, TOKENS), Writer(run)
            clients.start()
            for target in targets(up, kept):
                if only in (None, target.name):
                    lines += rounds(up, clients, target, count)
            clients.stop()
            lost = writer.missing()
            if only is None:
                lines.append(ended(up))
    return [
        *lines,
        {"name": "chaos.serve.wrong_answers", "value": len(clients.wrong), "unit": f"of {len(clients.seen)} requests"}
        | {"peer": None, "ratio": None, "goal": 0, "met": not clients.wrong},
        {"name": "chaos.serve.lost_metrics", "value": lost, "unit": f"of {writer.steps} values", "peer": None, "ratio": None}
        | {"goal": 0, "met": lost == 0},
    ]


@contextmanager
def store(folder: Path) -> Generator[Store]:
    """A real MLflow server on a real PostgreSQL."""
    with pgserver.get_server(folder / "postgres") as database:
        server = MlflowServer(database.get_uri().replace("postgresql://", "postgresql+psycopg2://"), folder / "files")
        server.start()
        try:
            yield Store(server, database)
        finally:
            server.kill()


def targets(up: Up, kept: Store) -> list[Target]:
    """What is killed, in this order."""
    return [
        Target("engine core", lambda: killed(up, "EngineCore")),
        Target("replica", lambda: killed(up, REPLICA)),
        Target("controller", lambda: killed(up, "ServeController")),
        Target("HAProxy", lambda: killed(up, "haproxy")),
        Target("MLflow", kept.server.kill, kept.server.start),
        Target("PostgreSQL", kept.kill_database, kept.database.ensure_postgres_running),
    ]


def named(up: Up, word: str) -> Generator[psutil.Process]:
    """Processes of a server with this word in their command line."""
    for process in psutil.Process(up.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if word in " ".join(process.cmdline()):
                yield process


def killed(up: Up, word: str) -> None:
    """Kill the first of them."""
    process = next(named(up, word), None)
    if process is None:
        raise RuntimeError(f"no process of the server has {word!r} in its command line")
    process.kill()


def rounds(up: Up, clients: Clients, target: Target, count: int) -> list[dict[str, Any]]:
    """Kill it so many times, each time when all is well and all replicas are there."""
    failed, recovered, again, bad = Counter[int](), list[float](), list[float](), list[int]()
    for number in range(count):
        wait(lambda: whole(up) and clients.calm(CALM_SECONDS))
        before, began = len(clients.seen), time.monotonic()
        target.kill()
        target.revive()
        # A replica listens until it has seen that its engine is dead.
        time.sleep(NOTICED_SECONDS)
        wait(lambda: whole(up))
        again.append(time.monotonic() - began)
        time.sleep(CALM_SECONDS)
        wait(lambda: clients.calm(CALM_SECONDS))
        seen = clients.seen[before:]
        failures = [at for at, status in seen if status != OK]
        failed.update(status for _, status in seen if status != OK)
        recovered.append(max(failures, default=began) - began)
        bad.append(len(failures))
        last = f"the last {recovered[-1]:.1f} s after, whole again after {again[-1]:.1f} s"
        print(f"{number + 1}/{count} {target.name}: {bad[-1]} of {len(seen)} failed, {last}", flush=True)
    key, none = f"chaos.serve.{target.name}", {"peer": None, "ratio": None, "goal": None, "met": None}
    return [
        {"name": key, "value": statistics.median(recovered), "unit": "s from the kill to the last failure"}
        | {"spread": [min(recovered), max(recovered)], "statuses": {str(status): many for status, many in failed.items()}}
        | none,
        {"name": f"{key}.failed", "value": statistics.median(bad), "unit": "requests", "spread": [min(bad), max(bad)]} | none,
        {"name": f"{key}.whole", "value": statistics.median(again), "unit": "s until all replicas are there"}
        | {"spread": [min(again), max(again)]}
        | none,
    ]


def ended(up: Up) -> dict[str, Any]:
    """Kill the raylet, without which nothing can be served: the server must end and say so."""
    there, began = psutil.Process(up.process.pid).children(recursive=True), time.monotonic()
    killed(up, "raylet/raylet")
    code = up.process.wait(ROUND_SECONDS)
    seconds = time.monotonic() - began
    print(f"raylet: the server ended with exit code {code}, {seconds:.1f} s after", flush=True)
    _, left = psutil.wait_procs(there, timeout=30)
    return {
        "name": "chaos.serve.raylet",
        "value": seconds,
        "unit": "s until the server has ended",
        "left": [process.name() for process in left],
        "peer": None,
        "ratio": None,
        "goal": None,
        "met": code == 1 and not left,
    }


def whole(up: Up) -> bool:
    """Whether all replicas take requests: each listens at a port of its own then."""
    ready = 0
    for process in named(up, REPLICA):
        with suppress(psutil.NoSuchProcess):
            ports = [each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            ready += any(port in REPLICA_PORTS for port in ports)
    return ready == REPLICAS


def wait(right: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ROUND_SECONDS
    while not right():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not well again after {ROUND_SECONDS:.0f} s")
        time.sleep(0.1)

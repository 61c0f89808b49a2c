"""Recovery of a server under load from killed processes, for bench/chaos.py."""

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
from bench.peers.clients import OK, Clients, collect_answers
from bench.peers.servers import RunningServer, Server
from tests.support.mlflow_server import MlflowServer
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.model.base_model import resolve_base_model
from trimtab.tracking import registry, runs
from trimtab.tracking.client import get_client
from trimtab.tracking.promotions import promote_version
from trimtab.tracking.runs import TrackedRun

PREFIX_NAME, TOKENS, SLOTS, REPLICAS = "chaos", 16, 8, 2
REPLICA_PROCESS = "ServeReplica:trimtab:engine"
# Ports on which the replicas of Ray Serve listen for HAProxy.
REPLICA_PORTS = range(30_000, 31_001)
QUESTIONS = ("What is the capital of France?", "Name three fruits.", "How do I boil an egg?", "Who wrote Hamlet?")
# A round ends when no request has failed for this time, and fails after the timeout.
STABLE_SECONDS, ROUND_TIMEOUT_SECONDS = 5.0, 300.0
LOG_INTERVAL_SECONDS, DETECTION_SECONDS = 0.25, 1.0


@dataclass(frozen=True)
class TrackingService:
    """MLflow server and its PostgreSQL database."""

    server: MlflowServer
    database: Any

    def kill_database(self) -> None:
        """Kill all processes of PostgreSQL."""
        parent = psutil.Process(self.database.get_pid())
        processes = [parent, *parent.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)


@dataclass
class MetricWriter:
    """Thread that logs a metric to MLflow continuously, to count lost values.

    Attributes:
        run: run of the metric.
        steps: number of logged values.
        stopped: event that stops the thread.
    """

    run: TrackedRun
    steps: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self.stopped.wait(LOG_INTERVAL_SECONDS):
            self.steps += 1
            self.run.log_metrics({"alive": float(self.steps)}, self.steps)

    def count_lost_values(self) -> int:
        """Stop the thread, send all values, and return the number of values that MLflow lacks."""
        self.stopped.set()
        self._thread.join()
        wait_until(lambda: self.run.flush(patient=True) == 0)
        return self.steps - len(get_client().get_metric_history(self.run.run_id, "alive"))


@dataclass(frozen=True)
class Target:
    """Process to kill.

    Attributes:
        name: name in the report.
        kill: function that kills the process.
        restart: function that starts it again, if nothing else does.
    """

    name: str
    kill: Callable[[], Any]
    restart: Callable[[], Any] = lambda: None


def measure_serving_recovery(base_name: str, count: int, only: str | None) -> list[dict[str, Any]]:
    """Kill each process of a server under load and build the lines of the report.

    Args:
        base_name: name of the base model.
        count: number of kills per process.
        only: process to kill; None for all.
    """
    base = resolve_base_model(base_name)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with run_tracking_service(folder) as tracking:
            os.environ["MLFLOW_TRACKING_URI"] = tracking.server.uri
            run = runs.start_run("chaos", "align", folder / "outbox")
            (random_prefix,) = servers.save_random_prefixes(base, folder / "random", 1, strength=4.0)
            prefix = build_prefix(random_prefix.vectors, replace(random_prefix.card, name=PREFIX_NAME))
            promote_version(registry.register_version(save_prefix(prefix, folder / "prefix"), run.run_id), "first")
            options = f"--num_replicas {REPLICAS} --engine.num_slots {SLOTS} --engine.max_model_len 512".split()
            options += ["--engine.cpu_kv_cache_gib", "1", "--detect", "false"]
            with servers.run_server(Server("trimtab", servers.build_trimtab_command(base.name, *options))) as up:
                model = f"{base.name}:{PREFIX_NAME}"
                clients = Clients(up.url, model, collect_answers(up.url, model, QUESTIONS, TOKENS), TOKENS)
                writer = MetricWriter(run)
                clients.start()
                for target in build_targets(up, tracking):
                    if only in (None, target.name):
                        lines += measure_kills(up, clients, target, count)
                clients.stop()
                lost = writer.count_lost_values()
                if only is None:
                    lines.append(measure_shutdown(up))
    wrong = len(clients.wrong_answers)
    return [
        *lines,
        {"name": "chaos.serve.wrong_answers", "value": wrong, "unit": f"of {len(clients.outcomes)} requests"}
        | {"peer": None, "ratio": None, "goal": 0, "met": wrong == 0},
        {"name": "chaos.serve.lost_metrics", "value": lost, "unit": f"of {writer.steps} values", "peer": None, "ratio": None}
        | {"goal": 0, "met": lost == 0},
    ]


@contextmanager
def run_tracking_service(folder: Path) -> Generator[TrackingService]:
    """Run an MLflow server on PostgreSQL while the context is open."""
    with pgserver.get_server(folder / "postgres") as database:
        server = MlflowServer(database.get_uri().replace("postgresql://", "postgresql+psycopg2://"), folder / "files")
        server.start()
        try:
            yield TrackingService(server, database)
        finally:
            server.kill()


def build_targets(up: RunningServer, tracking: TrackingService) -> list[Target]:
    """Build the list of processes to kill, in this order."""
    return [
        Target("engine core", lambda: kill_process(up, "EngineCore")),
        Target("replica", lambda: kill_process(up, REPLICA_PROCESS)),
        Target("controller", lambda: kill_process(up, "ServeController")),
        Target("HAProxy", lambda: kill_process(up, "haproxy")),
        Target("MLflow", tracking.server.kill, tracking.server.start),
        Target("PostgreSQL", tracking.kill_database, tracking.database.ensure_postgres_running),
    ]


def find_processes(up: RunningServer, text: str) -> Generator[psutil.Process]:
    """Yield the processes of a server whose command line contains a text."""
    for process in psutil.Process(up.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if text in " ".join(process.cmdline()):
                yield process


def kill_process(up: RunningServer, text: str) -> None:
    """Kill the first process of a server whose command line contains a text; raise RuntimeError if there is none."""
    process = next(find_processes(up, text), None)
    if process is None:
        raise RuntimeError(f"no process of the server has {text!r} in its command line")
    process.kill()


def measure_kills(up: RunningServer, clients: Clients, target: Target, count: int) -> list[dict[str, Any]]:
    """Kill a process repeatedly, each time after full recovery, and build the lines of the report."""
    statuses = Counter[int]()
    # Of each round: seconds to the last failure, seconds until all replicas are ready, and number of failed requests.
    failure_seconds, ready_seconds, failure_counts = list[float](), list[float](), list[int]()
    for number in range(count):
        wait_until(lambda: are_replicas_ready(up) and clients.is_stable(STABLE_SECONDS))
        previous, start = len(clients.outcomes), time.monotonic()
        target.kill()
        target.restart()
        # A replica listens until it detects that its engine is dead.
        time.sleep(DETECTION_SECONDS)
        wait_until(lambda: are_replicas_ready(up))
        ready_seconds.append(time.monotonic() - start)
        time.sleep(STABLE_SECONDS)
        wait_until(lambda: clients.is_stable(STABLE_SECONDS))
        outcomes = clients.outcomes[previous:]
        failures = [(at, status) for at, status in outcomes if status != OK]
        statuses.update(status for _, status in failures)
        failure_seconds.append(max((at for at, _ in failures), default=start) - start)
        failure_counts.append(len(failures))
        times = f"last failure after {failure_seconds[-1]:.1f} s, all replicas ready after {ready_seconds[-1]:.1f} s"
        print(f"{number + 1}/{count} {target.name}: {len(failures)} of {len(outcomes)} failed, {times}", flush=True)
    key, rest = f"chaos.serve.{target.name}", {"peer": None, "ratio": None, "goal": None, "met": None}
    return [
        {"name": key, "value": statistics.median(failure_seconds), "unit": "s from the kill to the last failure"}
        | {"spread": [min(failure_seconds), max(failure_seconds)]}
        | {"statuses": {str(status): number for status, number in statuses.items()}}
        | rest,
        {"name": f"{key}.failed", "value": statistics.median(failure_counts), "unit": "requests"}
        | {"spread": [min(failure_counts), max(failure_counts)]}
        | rest,
        {"name": f"{key}.whole", "value": statistics.median(ready_seconds), "unit": "s until all replicas are there"}
        | {"spread": [min(ready_seconds), max(ready_seconds)]}
        | rest,
    ]


def measure_shutdown(up: RunningServer) -> dict[str, Any]:
    """Kill the raylet, without which the server cannot work, and measure the time until the server exits with code 1."""
    processes, start = psutil.Process(up.process.pid).children(recursive=True), time.monotonic()
    kill_process(up, "raylet/raylet")
    code = up.process.wait(ROUND_TIMEOUT_SECONDS)
    seconds = time.monotonic() - start
    print(f"raylet: the server exited with code {code} after {seconds:.1f} s", flush=True)
    _, remaining = psutil.wait_procs(processes, timeout=30)
    return {
        "name": "chaos.serve.raylet",
        "value": seconds,
        "unit": "s until the server has ended",
        "left": [process.name() for process in remaining],
        "peer": None,
        "ratio": None,
        "goal": None,
        "met": code == 1 and not remaining,
    }


def are_replicas_ready(up: RunningServer) -> bool:
    """Return whether all replicas accept requests, that is, each listens on a port."""
    ready = 0
    for process in find_processes(up, REPLICA_PROCESS):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            ports = [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]
            ready += any(port in REPLICA_PORTS for port in ports)
    return ready == REPLICAS


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true; raise RuntimeError after the timeout of a round."""
    deadline = time.monotonic() + ROUND_TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no recovery within {ROUND_TIMEOUT_SECONDS:.0f} s")
        time.sleep(0.1)

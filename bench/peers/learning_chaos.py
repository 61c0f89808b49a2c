"""Killing what learns a prefix on a cluster of three nodes: used by bench/chaos.py."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from tests.support.prompt_rows import write_prompt_files
from tests.support.ray_nodes import WORKERS, RayNodes, start_ray_nodes
from trimtab import settings
from trimtab.artifacts.prefix import Prefix, load_prefix
from trimtab.tracking.client import get_client

EVERY, ROUND_SECONDS, JOB_SECONDS = 5, 300.0, 3600.0
# How far a prefix may be from that of a job that nothing disturbed.
SAME = 1e-5


@dataclass(frozen=True)
class Job:
    """A submitted align job."""

    name: str
    process: "subprocess.Popen[str]"

    def step(self) -> int:
        """Of its newest checkpoint."""
        steps = [0]
        for path in (settings.get_runs_folder() / self.name).glob("*/train/checkpoint_*/state.json"):
            try:
                steps.append(json.loads(path.read_text())["step"])
            except (FileNotFoundError, ValueError):
                # Just being written, or taken away.
                continue
        return max(steps)

    def reach(self, step: int) -> None:
        """Wait until it has come so far. Raises RuntimeError where it ended before."""
        deadline = time.monotonic() + ROUND_SECONDS
        while self.step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not reach step {step}: {self.process.communicate()[0][-2000:]}")
            time.sleep(0.05)

    def ended(self) -> Prefix:
        """Its prefix. Raises RuntimeError where it failed."""
        said, _ = self.process.communicate(timeout=JOB_SECONDS)
        if self.process.returncode:
            raise RuntimeError(f"{self.name} failed: {said[-2000:]}")
        (folder,) = (settings.get_runs_folder() / self.name).glob("*")
        return load_prefix(folder / "prefix")


def chaos(base: str, count: int, only: str | None, folder: Path) -> list[dict[str, Any]]:
    """Kill each process so many times in one job; how long it took to go on, and what was lost."""
    options, lines = given(base, count, folder), list[dict[str, Any]]()
    with start_ray_nodes() as there:
        alone = started("alone", there, [*options, "--scale.num_workers", "1"]).ended()
        targets: dict[str, tuple[Callable[[], Any], list[str]]] = {
            "train worker": (worker, ["--scale.max_failures", str(count)]),
            "driver": (lambda: driver("driver"), []),
            "raylet": (lambda: replaced(there), ["--scale.max_failures", str(count), "--scale.min_workers", str(WORKERS - 1)]),
        }
        for name, (kill, more) in targets.items():
            if only in (None, name):
                job = started(name.split()[-1], there, [*options, "--scale.num_workers", str(WORKERS), *more], count)
                lines += rounds(name, job, kill, count, alone)
    return lines


def rounds(name: str, job: Job, kill: Callable[[], Any], count: int, alone: Prefix) -> list[dict[str, Any]]:
    """So many kills of one process of a job, and its end."""
    took: list[float] = []
    for number in range(count):
        job.reach((2 * number + 1) * EVERY)
        at, began = job.step(), time.monotonic()
        kill()
        job.reach(at + EVERY)
        took.append(time.monotonic() - began)
        print(f"{number + 1}/{count} {name}: killed at step {at}, the next checkpoint {took[-1]:.1f} s after", flush=True)
    prefix = job.ended()
    steps = [metric.step for metric in get_client().get_metric_history(prefix.card.run_id, "train/loss")]
    wanted = prefix.card.method["steps"]
    gaps, twice = wanted - len(set(steps)), len(steps) - len(set(steps))
    difference = (prefix.vectors - alone.vectors).abs().max().item()
    print(f"{name}: prefix {difference:.1e} apart, {gaps} steps missing, {twice} twice", flush=True)
    key = f"chaos.learn.{name}"
    return [
        {"name": key, "value": statistics.median(took), "unit": "s to the next checkpoint", "spread": [min(took), max(took)]}
        | {"peer": None, "ratio": None, "goal": None, "met": None},
        {"name": f"{key}.prefix", "value": difference, "unit": "largest difference", "peer": "undisturbed", "ratio": None}
        | {"goal": SAME, "met": difference <= SAME},
        {"name": f"{key}.curve", "value": gaps + twice, "unit": f"of {wanted} steps missing or twice", "peer": None}
        | {"ratio": None, "goal": 0, "met": gaps + twice == 0},
    ]


def worker() -> None:
    """One training worker."""
    found(lambda words: "RayTrainWorker" in " ".join(words)).kill()


def driver(name: str) -> None:
    """The process that started the job's training."""
    wanted = ["-m", "trimtab", "align", "--name", name]
    found(lambda words: words[1:6] == wanted).kill()


def found(right: Callable[[list[str]], bool]) -> psutil.Process:
    """The first process with such a command line, as soon as there is one."""
    deadline = time.monotonic() + ROUND_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and right(process.info["cmdline"]):
                return process
        time.sleep(0.05)
    raise RuntimeError("the process to kill is not there")


def replaced(there: RayNodes) -> None:
    """Kill the raylet of a node, and so the node; another one comes in its place."""
    node = there.workers.pop(0)
    node.all_processes[PROCESS_TYPE_RAYLET][0].process.kill()
    there.cluster.remove_node(node, allow_graceful=False)
    there.workers.append(there.cluster.add_node(num_cpus=1))


def given(base: str, count: int, folder: Path) -> list[str]:
    """The options of all jobs: rows of our own, and steps for so many kills."""
    options = f"--base {base} --register false --evaluate.limit 2 --evaluate.max_tokens 4 --scale.cpus_per_worker 1".split()
    options += [
        "--train.max_steps",
        str((2 * count + 2) * EVERY),
        "--train.global_batch_size",
        "6",
        "--train.micro_batch_size",
        "2",
    ]
    options += ["--train.checkpoint_every", str(EVERY), "--train.early_stopping_patience", "0", "--train.dtype", "fp32"]
    files = write_prompt_files(folder)
    return [*options, "--data.harmful", str(files / "harmful.jsonl"), "--data.benign", str(files / "benign.jsonl")]


def started(name: str, there: RayNodes, options: list[str], retries: int = 0) -> Job:
    """A job, submitted as its users do it."""
    command = [sys.executable, "-m", "trimtab", "submit", "--name", name, "--address", there.address, "--wait"]
    command += ["--max_retries", str(retries), "--env_vars", "TRIMTAB_HOME"]
    command += ["--", "align", "--name", name, "--resume", "auto", *options]
    return Job(name, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

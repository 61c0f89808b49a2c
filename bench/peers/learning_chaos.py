"""Recovery of training on a cluster of three nodes from killed processes, for bench/chaos.py."""

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

CHECKPOINT_STEPS = 5
ROUND_TIMEOUT_SECONDS, JOB_TIMEOUT_SECONDS = 300.0, 3600.0
# Largest difference between a prefix and that of an undisturbed job.
MAX_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Job:
    """Submitted align job.

    Attributes:
        name: name of the job and of its runs.
        process: process of the submit command.
    """

    name: str
    process: "subprocess.Popen[str]"

    def read_step(self) -> int:
        """Return the step of the latest checkpoint, 0 without a checkpoint."""
        steps = [0]
        for path in (settings.get_runs_folder() / self.name).glob("*/train/checkpoint_*/state.json"):
            try:
                steps.append(json.loads(path.read_text())["step"])
            except (FileNotFoundError, ValueError):
                # The job writes or deletes this file at the same time.
                continue
        return max(steps)

    def wait_for_step(self, step: int) -> None:
        """Wait for a checkpoint at or after a step; raise RuntimeError if the job ends or takes too long."""
        deadline = time.monotonic() + ROUND_TIMEOUT_SECONDS
        while self.read_step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not reach step {step}: {self.process.communicate()[0][-2000:]}")
            time.sleep(0.05)

    def wait_for_prefix(self) -> Prefix:
        """Wait for the end of the job and return its prefix; raise RuntimeError if the job fails."""
        output, _ = self.process.communicate(timeout=JOB_TIMEOUT_SECONDS)
        if self.process.returncode:
            raise RuntimeError(f"{self.name} failed: {output[-2000:]}")
        (folder,) = (settings.get_runs_folder() / self.name).glob("*")
        return load_prefix(folder / "prefix")


def measure_training_recovery(base: str, count: int, only: str | None, folder: Path) -> list[dict[str, Any]]:
    """Kill each process of a training job and build the lines of the report.

    Args:
        base: name of the base model.
        count: number of kills per process.
        only: process to kill; None for all.
        folder: folder of the prompt files.
    """
    options = build_options(base, count, folder)
    lines: list[dict[str, Any]] = []
    with start_ray_nodes() as nodes:
        reference = submit_job("alone", nodes, [*options, "--scale.num_workers", "1"]).wait_for_prefix()
        retry_options = ["--scale.max_failures", str(count)]
        targets: dict[str, tuple[Callable[[], Any], list[str]]] = {
            "train worker": (kill_worker, retry_options),
            "driver": (lambda: kill_driver("driver"), []),
            "raylet": (lambda: replace_node(nodes), [*retry_options, "--scale.min_workers", str(WORKERS - 1)]),
        }
        for name, (kill, target_options) in targets.items():
            if only in (None, name):
                job_options = [*options, "--scale.num_workers", str(WORKERS), *target_options]
                job = submit_job(name.split()[-1], nodes, job_options, count)
                lines += measure_kills(name, job, kill, count, reference)
    return lines


def measure_kills(name: str, job: Job, kill: Callable[[], Any], count: int, reference: Prefix) -> list[dict[str, Any]]:
    """Kill one process of a job repeatedly and build the lines of the report.

    Args:
        name: name of the process in the report.
        job: the job.
        kill: function that kills the process.
        count: number of kills.
        reference: prefix of the undisturbed job.
    """
    durations: list[float] = []
    for number in range(count):
        job.wait_for_step((2 * number + 1) * CHECKPOINT_STEPS)
        step, start = job.read_step(), time.monotonic()
        kill()
        job.wait_for_step(step + CHECKPOINT_STEPS)
        durations.append(time.monotonic() - start)
        print(f"{number + 1}/{count} {name}: killed at step {step}, next checkpoint after {durations[-1]:.1f} s", flush=True)
    prefix = job.wait_for_prefix()
    steps = [metric.step for metric in get_client().get_metric_history(prefix.card.run_id, "train/loss")]
    total = prefix.card.method["steps"]
    missing, duplicates = total - len(set(steps)), len(steps) - len(set(steps))
    difference = (prefix.vectors - reference.vectors).abs().max().item()
    print(f"{name}: prefix difference {difference:.1e}, {missing} steps missing, {duplicates} duplicated", flush=True)
    key = f"chaos.learn.{name}"
    spread = [min(durations), max(durations)]
    return [
        {"name": key, "value": statistics.median(durations), "unit": "s to the next checkpoint", "spread": spread}
        | {"peer": None, "ratio": None, "goal": None, "met": None},
        {"name": f"{key}.prefix", "value": difference, "unit": "largest difference", "peer": "undisturbed", "ratio": None}
        | {"goal": MAX_DIFFERENCE, "met": difference <= MAX_DIFFERENCE},
        {"name": f"{key}.curve", "value": missing + duplicates, "unit": f"of {total} steps missing or twice", "peer": None}
        | {"ratio": None, "goal": 0, "met": missing + duplicates == 0},
    ]


def kill_worker() -> None:
    """Kill one training worker."""
    wait_for_process(lambda arguments: "RayTrainWorker" in " ".join(arguments)).kill()


def kill_driver(name: str) -> None:
    """Kill the driver of a job, the process that started its training."""
    command = ["-m", "trimtab", "align", "--name", name]
    wait_for_process(lambda arguments: arguments[1:6] == command).kill()


def wait_for_process(matches: Callable[[list[str]], bool]) -> psutil.Process:
    """Wait for a process and return it; raise RuntimeError after a timeout.

    Args:
        matches: function that returns whether a command line is that of the process.
    """
    deadline = time.monotonic() + ROUND_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and matches(process.info["cmdline"]):
                return process
        time.sleep(0.05)
    raise RuntimeError("the process to kill does not exist")


def replace_node(nodes: RayNodes) -> None:
    """Kill the raylet of a worker node, which removes the node, and add a new node."""
    node = nodes.workers.pop(0)
    node.all_processes[PROCESS_TYPE_RAYLET][0].process.kill()
    nodes.cluster.remove_node(node, allow_graceful=False)
    nodes.workers.append(nodes.cluster.add_node(num_cpus=1))


def build_options(base: str, count: int, folder: Path) -> list[str]:
    """Write prompt files, and build the common options of all jobs, with enough steps for all kills."""
    options = f"--base {base} --register false --evaluate.limit 2 --evaluate.max_tokens 4 --scale.cpus_per_worker 1".split()
    options += ["--train.max_steps", str((2 * count + 2) * CHECKPOINT_STEPS), "--train.global_batch_size", "6"]
    options += ["--train.micro_batch_size", "2", "--train.checkpoint_every", str(CHECKPOINT_STEPS)]
    options += ["--train.early_stopping_patience", "0", "--train.dtype", "fp32"]
    files = write_prompt_files(folder)
    return [*options, "--data.harmful", str(files / "harmful.jsonl"), "--data.benign", str(files / "benign.jsonl")]


def submit_job(name: str, nodes: RayNodes, options: list[str], retries: int = 0) -> Job:
    """Submit an align job with the command line of trimtab."""
    command = [sys.executable, "-m", "trimtab", "submit", "--name", name, "--address", nodes.address, "--wait"]
    command += ["--max_retries", str(retries), "--env_vars", "TRIMTAB_HOME"]
    command += ["--", "align", "--name", name, "--resume", "auto", *options]
    return Job(name, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

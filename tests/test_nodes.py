"""A cluster of several nodes, of which one is killed while a submitted job trains on it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
from ray._private.node import Node
from ray.cluster_utils import Cluster

from tests.test_align import BENIGN, HARMFUL, REFUSAL
from trimtab import ports, settings
from trimtab import prefix as prefixes
from trimtab.tracking.client import client

STEPS, WAIT_SECONDS = 120, 300
OPTIONS = (
    f"--train.steps {STEPS} --train.batch 6 --train.micro_batch 2 --train.checkpoint_every 10 --train.patience 0 "
    "--train.precision fp32 --evaluate.limit 2 --evaluate.max_tokens 4 --scale.cpus 1"
)
DRIVER = ["-m", "trimtab", "align", "--name", "driven"]


@pytest.fixture(scope="module")
def nodes() -> Generator[tuple[Cluster, list[Node], str]]:
    """A head without cores, three workers of one core each, and the dashboard's address."""
    dashboard, agent = ports.free(2)
    path = os.environ["PATH"]
    # The nodes' python is the one that has trimtab.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(3)]
        cluster.wait_for_nodes()
        yield cluster, workers, f"http://127.0.0.1:{dashboard}"
    finally:
        cluster.shutdown()
        os.environ["PATH"] = path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, prompts, target in (
        ("harmful", HARMFUL, REFUSAL),
        ("benign", BENIGN, "Of course! Here is all there is to know."),
    ):
        rows = [{"prompt": f"{prompt}{', please' * times}", "target": target} for times in range(6) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def align(name: str, address: str, base: Path, files: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "trimtab", "submit", "--name", name, "--address", address, "--wait"]
    command += ["--environment", "TRIMTAB_HOME", "--", "align", "--name", name, "--base", str(base)]
    command += ["--data.harmful", str(files / "harmful.jsonl"), "--data.benign", str(files / "benign.jsonl")]
    return [*command, *OPTIONS.split(), *more]


def first_checkpoint(name: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not list((settings.runs() / name).glob("*/train/checkpoint_*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def learned(name: str) -> prefixes.Prefix:
    (folder,) = (settings.runs() / name).glob("*")
    return prefixes.load(folder / "prefix")


@pytest.fixture(scope="module")
def alone(nodes, small, files) -> prefixes.Prefix:
    """What one worker learns that nothing disturbs."""
    command = align("alone", nodes[2], small.path, files, "--scale.workers", "1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return learned("alone")


def test_a_node_that_is_killed_changes_neither_the_prefix_nor_the_curve(nodes, small, files, alone):
    cluster, workers, address = nodes
    many = align("many", address, small.path, files, "--scale.workers", "3", "--scale.least_workers", "2")
    process = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first_checkpoint("many", process)
    cluster.remove_node(workers[-1], allow_graceful=False)
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, said
    ours = learned("many")
    assert (ours.vectors - alone.vectors).abs().max() < 1e-5
    assert "trimtab.last_failure" in client().get_run(ours.card.run_id).data.tags, "nothing was lost: the test shows nothing"
    one_run("many", ours.card.run_id)
    curve = {m.step for m in client().get_metric_history(ours.card.run_id, "train/loss")}
    assert curve == set(range(1, STEPS + 1)), "the curve must have no gap"


def test_a_killed_driver_goes_on_in_the_same_run(nodes, small, files, alone):
    _, _, address = nodes
    command = align("driven", address, small.path, files, "--resume", "auto")
    process = subprocess.Popen(
        [*command[:4], "--retries", "1", *command[4:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first_checkpoint("driven", process)
    drivers = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:6] == DRIVER]
    assert len(drivers) == 1
    drivers[0].kill()
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, said
    assert "try 1 of 2 ended with exit code -9" in said
    ours = learned("driven")
    assert (ours.vectors - alone.vectors).abs().max() < 1e-5
    one_run("driven", ours.card.run_id)


def one_run(name: str, run_id: str) -> None:
    run = client().get_run(run_id)
    assert run.info.status == "FINISHED"
    named = client().search_runs([run.info.experiment_id], f"attributes.run_name = '{name}'")
    assert [each.info.run_id for each in named] == [run_id]

"""A cluster of several nodes, of which one is killed while a submitted job trains on it."""

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from tests.support import ray_nodes
from tests.support.align_runs import OPTIONS, STEPS, WAIT_SECONDS, first_checkpoint
from tests.support.prompt_rows import prompt_files
from tests.support.ray_nodes import Nodes
from trimtab import settings
from trimtab.artifacts.prefix import Prefix, load_prefix
from trimtab.tracking.client import get_client

DRIVER = ["-m", "trimtab", "align", "--name", "driven"]


@pytest.fixture(scope="module")
def nodes() -> Generator[Nodes]:
    with ray_nodes.nodes() as up:
        yield up


def align(name: str, address: str, base: Path, files: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "trimtab", "submit", "--name", name, "--address", address, "--wait"]
    command += ["--env_vars", "TRIMTAB_HOME", "--", "align", "--name", name, "--base", str(base)]
    command += ["--data.harmful", str(files / "harmful.jsonl"), "--data.benign", str(files / "benign.jsonl")]
    return [*command, *OPTIONS.split(), *more]


def learned(name: str) -> Prefix:
    (folder,) = (settings.get_runs_folder() / name).glob("*")
    return load_prefix(folder / "prefix")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return prompt_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def alone(nodes, small, files) -> Prefix:
    """What one worker learns that nothing disturbs."""
    command = align("alone", nodes.address, small.path, files, "--scale.num_workers", "1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return learned("alone")


def test_a_node_that_is_killed_changes_neither_the_prefix_nor_the_curve(nodes, small, files, alone):
    many = align("many", nodes.address, small.path, files, "--scale.num_workers", "3", "--scale.min_workers", "2")
    process = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first_checkpoint(settings.get_runs_folder() / "many", process)
    nodes.cluster.remove_node(nodes.workers.pop(), allow_graceful=False)
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    nodes.workers.append(nodes.cluster.add_node(num_cpus=1))
    assert process.returncode == 0, said
    ours = learned("many")
    assert (ours.vectors - alone.vectors).abs().max() < 1e-5
    assert "trimtab.last_failure" in get_client().get_run(ours.card.run_id).data.tags, (
        "nothing was lost: the test shows nothing"
    )
    one_run("many", ours.card.run_id)


def test_a_killed_driver_goes_on_in_the_same_run(nodes, small, files, alone):
    command = align("driven", nodes.address, small.path, files, "--resume", "auto")
    process = subprocess.Popen(
        [*command[:4], "--max_retries", "1", *command[4:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first_checkpoint(settings.get_runs_folder() / "driven", process)
    drivers = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:6] == DRIVER]
    assert len(drivers) == 1
    drivers[0].kill()
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, said
    assert "attempt 1 of 2 ended with exit code -9" in said
    ours = learned("driven")
    assert (ours.vectors - alone.vectors).abs().max() < 1e-5
    one_run("driven", ours.card.run_id)


def test_a_study_on_the_cluster_gives_the_table_of_one_process(nodes, small, files, tmp_path):
    tables = []
    for name, workers, submit in (
        ("here", 1, []),
        (
            "there",
            3,
            ["submit", "--name", "there", "--address", nodes.address, "--wait", "--env_vars", "TRIMTAB_HOME", "--"],
        ),
    ):
        config = {"name": name, "seeds": [0], "arms": {"sta": {}}}
        config["out"] = str(tmp_path / name)
        config["shared"] = {
            "base": str(small.path),
            "data": {kind: str(files / f"{kind}.jsonl") for kind in ("harmful", "benign")} | {"filter_rules": []},
            "train": {"max_steps": 10, "global_batch_size": 6, "micro_batch_size": 2, "validate_every": 5, "dtype": "fp32"},
            "evaluate": {"limit": 4, "max_tokens": 8},
            "scale": {"num_workers": workers, "cpus_per_worker": 1},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "trimtab", *submit, "study", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append((tmp_path / name / "report.csv").read_text())
    assert tables[0] == tables[1]
    assert "sta" in tables[0]


def one_run(name: str, run_id: str) -> None:
    run = get_client().get_run(run_id)
    assert run.info.status == "FINISHED"
    named = get_client().search_runs([run.info.experiment_id], f"attributes.run_name = '{name}'")
    assert [each.info.run_id for each in named] == [run_id]
    steps = [m.step for m in get_client().get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(1, STEPS + 1)), "the curve must have no gap, and no step twice"

"""Submitted jobs on a cluster of several nodes: a killed node, a killed driver, and a study."""

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from tests.support import ray_nodes
from tests.support.align_runs import OPTIONS, STEPS, WAIT_SECONDS, wait_for_checkpoint
from tests.support.prompt_rows import write_prompt_files
from tests.support.ray_nodes import RayNodes
from trimtab import settings
from trimtab.artifacts.prefix import Prefix, load_prefix
from trimtab.tracking.client import get_client

DRIVER = ["-m", "trimtab", "align", "--name", "driven"]


@pytest.fixture(scope="module")
def nodes() -> Generator[RayNodes]:
    with ray_nodes.start_ray_nodes() as running_nodes:
        yield running_nodes


def build_align_command(name: str, address: str, base: Path, prompt_folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "trimtab", "submit", "--name", name, "--address", address, "--wait"]
    command += ["--env_vars", "TRIMTAB_HOME", "--", "align", "--name", name, "--base", str(base)]
    command += ["--data.harmful", str(prompt_folder / "harmful.jsonl"), "--data.benign", str(prompt_folder / "benign.jsonl")]
    return [*command, *OPTIONS.split(), *options]


def load_trained_prefix(name: str) -> Prefix:
    (folder,) = (settings.get_runs_folder() / name).glob("*")
    return load_prefix(folder / "prefix")


@pytest.fixture(scope="module")
def prompt_folder(tmp_path_factory) -> Path:
    return write_prompt_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def reference_prefix(nodes, tiny_base, prompt_folder) -> Prefix:
    """Prefix that one worker trains without a failure."""
    command = build_align_command("alone", nodes.address, tiny_base.path, prompt_folder, "--scale.num_workers", "1")
    completed = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return load_trained_prefix("alone")


def test_killed_node_changes_neither_prefix_nor_curve(nodes, tiny_base, prompt_folder, reference_prefix):
    command = build_align_command(
        "many", nodes.address, tiny_base.path, prompt_folder, "--scale.num_workers", "3", "--scale.min_workers", "2"
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_checkpoint(settings.get_runs_folder() / "many", process)
    nodes.kill_worker()
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    nodes.add_worker()
    assert process.returncode == 0, output
    prefix = load_trained_prefix("many")
    assert (prefix.vectors - reference_prefix.vectors).abs().max() < 1e-5
    assert "trimtab.last_failure" in get_client().get_run(prefix.card.run_id).data.tags, (
        "no failure was recorded, so that the test proves nothing"
    )
    assert_single_complete_run("many", prefix.card.run_id)


def test_killed_driver_continues_in_the_same_run(nodes, tiny_base, prompt_folder, reference_prefix):
    command = build_align_command("driven", nodes.address, tiny_base.path, prompt_folder, "--resume", "auto")
    process = subprocess.Popen(
        [*command[:4], "--max_retries", "1", *command[4:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_checkpoint(settings.get_runs_folder() / "driven", process)
    drivers = [process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[1:6] == DRIVER]
    assert len(drivers) == 1
    drivers[0].kill()
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "attempt 1 of 2 ended with exit code -9" in output
    prefix = load_trained_prefix("driven")
    assert (prefix.vectors - reference_prefix.vectors).abs().max() < 1e-5
    assert_single_complete_run("driven", prefix.card.run_id)


def test_study_on_cluster_equals_local_study(nodes, tiny_base, prompt_folder, tmp_path):
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
            "base": str(tiny_base.path),
            "data": {kind: str(prompt_folder / f"{kind}.jsonl") for kind in ("harmful", "benign")} | {"filter_rules": []},
            "train": {"max_steps": 10, "global_batch_size": 6, "micro_batch_size": 2, "validate_every": 5, "dtype": "fp32"},
            "evaluate": {"limit": 4, "max_tokens": 8},
            "scale": {"num_workers": workers, "cpus_per_worker": 1},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "trimtab", *submit, "study", "--config", str(path)]
        completed = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        tables.append((tmp_path / name / "report.csv").read_text())
    assert tables[0] == tables[1]
    assert "sta" in tables[0]


def assert_single_complete_run(name: str, run_id: str) -> None:
    run = get_client().get_run(run_id)
    assert run.info.status == "FINISHED"
    runs = get_client().search_runs([run.info.experiment_id], f"attributes.run_name = '{name}'")
    assert [found.info.run_id for found in runs] == [run_id]
    steps = [metric.step for metric in get_client().get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(1, STEPS + 1)), "the curve must have no gap, and no step twice"

"""The align job on a local Ray: results with several workers, usage errors, Ctrl-C and resume."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from tests.support.align_runs import SHORT_STEPS, read_loss_curve, slow_steps, train, wait_for_checkpoint
from tests.support.commands import find_remaining_processes
from tests.support.object_store import list_keys
from tests.support.prompt_rows import BENIGN, HARMFUL, REFUSAL
from tests.support.sockets import find_public_listeners
from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.cli.main import build_settings, main, parse_options
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.tracking.client import get_client


@pytest.fixture(scope="module")
def two_worker_run(cluster, tiny_base, tmp_path_factory) -> tuple[torch.Tensor, str]:
    """Vectors that two workers learn, and the id of their MLflow run."""
    return train(tiny_base, tmp_path_factory.mktemp("two"), workers=2)


def test_two_workers_learn_the_vectors_of_one(undisturbed, two_worker_run):
    assert (two_worker_run[0] - undisturbed).abs().max() < 1e-5


def test_loss_falls_and_mlflow_has_every_step(two_worker_run):
    _, run_id = two_worker_run
    losses = read_loss_curve(run_id)
    assert sorted(losses) == list(range(1, SHORT_STEPS + 1))
    assert losses[SHORT_STEPS] < losses[1]
    validations = get_client().get_metric_history(run_id, "train/validation_loss")
    assert [metric.step for metric in validations] == [10, 20, 30, SHORT_STEPS]
    utilization = get_client().get_metric_history(run_id, "system/node_0/cpu_utilization_percentage")
    assert [metric.step for metric in utilization] == list(range(4, SHORT_STEPS + 1, 4))
    assert "trimtab.prefix_tree" not in get_client().get_run(run_id).data.tags


FSDP = {"parallelism": "fsdp", "activation_checkpointing": True}


@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def fsdp_vectors(bucket, tiny_base, fsdp_folder) -> torch.Tensor:
    """Vectors that two workers learn with FSDP2 and remote checkpoints.

    Each worker has half of every layer, and runs extra passes to stay synchronized with the other.
    """
    return train(tiny_base, fsdp_folder, workers=2, storage_path=bucket, **FSDP)[0]


def test_two_fsdp_workers_learn_the_vectors_of_one(undisturbed, fsdp_vectors):
    assert (fsdp_vectors - undisturbed).abs().max() < 1e-4


def test_checkpoints_are_remote_only(fsdp_vectors, fsdp_folder):
    assert any(key.startswith(f"{fsdp_folder.name}/train/checkpoint_") for key in list_keys())
    assert not (fsdp_folder / "train").exists()


def test_repeated_training_returns_the_remote_checkpoint(fsdp_vectors, fsdp_folder, bucket, tiny_base, capsys):
    vectors, _ = train(tiny_base, fsdp_folder, workers=2, storage_path=bucket, **FSDP)
    assert torch.equal(vectors, fsdp_vectors)
    assert "training" not in capsys.readouterr().out


def test_job_listens_on_loopback_only(cluster):
    assert find_public_listeners() == []


def test_options_yaml_and_python_give_equal_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x\nobjective_options: {gamma: 1.0}\ntrain: {max_steps: 7, learning_rate: 0.01}\n")
    command = entry_points(group="trimtab.commands")["align"].load()
    options = ["--name", "x", "--objective_options.gamma", "1.0", "--train.max_steps", "7", "--train.learning_rate", "0.01"]
    from_options, _ = parse_options(command, "align", options)
    from_yaml, _ = parse_options(command, "align", ["--config", str(tmp_path / "a.yaml")])
    from_values = build_settings(
        AlignConfig, {"name": "x", "objective_options.gamma": 1.0, "train.max_steps": 7, "train.learning_rate": 0.01}, "x"
    )
    from_python = AlignConfig(name="x", objective_options={"gamma": 1.0}, train=TrainConfig(max_steps=7, learning_rate=0.01))
    assert from_options == from_yaml == from_values == from_python


USAGE_ERRORS = {
    "missing file": (["--data.harmful", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "wrong column": (["--data.harmful", "goals.csv", "--data.benign", "empty.jsonl"], "has no column 'prompt'; it has goal"),
    "empty file": (["--data.harmful", "empty.jsonl"], "empty.jsonl has no rows"),
    "missing model": (["--base", "no-such-model"], "no base model 'no-such-model'"),
    "unknown objective": (["--objective", "magic"], "there are: bco, distil, dpo, dro, likelihood"),
    "unknown objective option": (["--objective_options.beam", "3"], "unexpected keyword argument 'beam'"),
    "too many workers": (["--scale.num_workers", "99"], "cannot share"),
    "bad name": (["--name", "a/b"], "cannot be a name"),
    "unknown option": (["--learning-rate", "3"], "unrecognized arguments: --learning-rate"),
    "text for a number": (["--train.max_steps", "many"], "train.max_steps"),
    "unknown class": (["--train.class_weights.safe", "2"], "train.class_weights: unknown class 'safe'"),
    "weight zero": (["--train.class_weights.harmful", "0"], "train.class_weights.harmful must be above 0, not 0.0"),
    "zero steps": (["--train.max_steps", "0"], "train.max_steps must be at least 1"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize(("options", "message"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_error_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "goals.csv").write_text("goal\nSteal\n")
    assert main(["align", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines
    assert lines[-1].startswith("trimtab: "), lines
    assert message in lines[-1], lines
    assert not any("Traceback" in line for line in lines)


def test_interrupted_run_resumes_and_registers_the_prefix(cluster, tiny_base, tmp_path, capsys):
    """Command line with own files and targets, Ctrl-C, --resume and registration."""
    harmful = [f"{prompt}{', please' * count}" for count in range(6) for prompt in HARMFUL]
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": prompt, "target": REFUSAL}) for prompt in harmful))
    rows = [
        f'"{prompt}{" please" * count}","Of course! Here is all there is to know about that."'
        for count in range(5)
        for prompt in BENIGN
    ]
    (tmp_path / "benign.csv").write_text("prompt,target\n" + "\n".join(rows))
    (tmp_path / "align.yaml").write_text(
        f"name: mine\nbase: {tiny_base.path}\n"
        f"data: {{harmful: {tmp_path}/harmful.jsonl, benign: {tmp_path}/benign.csv, "
        "validation_fraction: 0.2, test_fraction: 0.2}\n"
        "train: {global_batch_size: 4, micro_batch_size: 2, validate_every: 20, checkpoint_every: 2, "
        "early_stopping_patience: 0}\n"
        "evaluate: {limit: 3, max_tokens: 8}\n"
    )
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "align",
        "--config",
        str(tmp_path / "align.yaml"),
        "--train.max_steps",
        str(SHORT_STEPS),
    ]
    folder = settings.get_runs_folder() / "mine"
    with slow_steps():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        wait_for_checkpoint(folder, process)
        # To the process group, as a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopping after this step, with a checkpoint" in output
    assert not find_remaining_processes(process.pid)
    assert main([*command[3:], "--resume"]) == 0
    assert len(list(folder.glob("*"))) == 1, "a resumed run must use the same folder"
    (run_folder,) = folder.glob("*")
    prefix = load_prefix(run_folder / "prefix")
    assert sorted(read_loss_curve(prefix.card.run_id)) == list(range(1, SHORT_STEPS + 1))
    run = get_client().get_run(prefix.card.run_id)
    assert run.info.status == "FINISHED"
    names = {entry.dataset.name for entry in run.inputs.dataset_inputs}
    assert names == {str(tmp_path / "harmful.jsonl"), str(tmp_path / "benign.csv")}
    assert (run_folder / "plane.png").exists()
    assert main(["list"]) == 0
    assert f"{tiny_base.name}:mine" in capsys.readouterr().out

"""The align job on a local Ray: the same prefix for any number of workers, after a killed worker, and after a Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points

import psutil
import pytest

from tests.support.align_runs import SHORT_STEPS, first_checkpoint, read_loss_curve, train
from tests.support.prompt_rows import BENIGN, HARMFUL, REFUSAL
from tests.support.sockets import beyond_this_machine
from trimtab import settings
from trimtab.artifacts.prefix import load_prefix
from trimtab.cli.main import build_settings, main, parse_options
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.model.base_model import resolve_base_model
from trimtab.tracking.client import get_client


def test_loss_falls_and_every_step_is_in_mlflow(cluster, base, tmp_path):
    _, run_id = train(base, tmp_path, workers=1, max_steps=12, validate_every=6)
    losses = read_loss_curve(run_id)
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
    assert len(get_client().get_metric_history(run_id, "train/validation_loss")) == 2
    busy = get_client().get_metric_history(run_id, "system/node_0/cpu_utilization_percentage")
    assert [m.step for m in busy] == [4, 8, 12]


def test_base_model_without_prefix_tree_batching_is_reported(cluster, small, tmp_path, capsys):
    shutil.copytree(small.path, tmp_path / "conv")
    path = tmp_path / "conv" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": ["full_attention", "conv"]}))
    _, run_id = train(resolve_base_model(str(tmp_path / "conv")), tmp_path / "run", workers=1, max_steps=4, validate_every=0)
    assert get_client().get_run(run_id).data.tags["trimtab.prefix_tree"] == "unavailable"
    assert capsys.readouterr().out.count("prefix-tree batching is not available") <= 1


def test_nothing_of_a_job_is_reached_from_other_machines(cluster):
    assert beyond_this_machine() == []


def test_two_workers_learn_what_one_does(undisturbed, small, tmp_path):
    vectors, _ = train(small, tmp_path, workers=2)
    assert (vectors - undisturbed).abs().max() < 1e-5


def test_workers_that_share_the_model_learn_what_one_does(undisturbed, small, tmp_path):
    """FSDP2: each worker holds half of every layer, and computes now and then for nothing, to stay in step with the other."""
    shared, _ = train(small, tmp_path, workers=2, parallelism="fsdp", activation_checkpointing=True)
    assert (shared - undisturbed).abs().max() < 1e-4


def test_a_field_is_the_same_by_option_by_yaml_and_in_python(tmp_path):
    """What is equal here is all that a run is made of."""
    (tmp_path / "a.yaml").write_text("name: x\nobjective_options: {gamma: 1.0}\ntrain: {max_steps: 7, learning_rate: 0.01}\n")
    command = entry_points(group="trimtab.commands")["align"].load()
    options = ["--name", "x", "--objective_options.gamma", "1.0", "--train.max_steps", "7", "--train.learning_rate", "0.01"]
    by_option, _ = parse_options(command, "align", options)
    by_yaml, _ = parse_options(command, "align", ["--config", str(tmp_path / "a.yaml")])
    by_values = build_settings(
        AlignConfig, {"name": "x", "objective_options.gamma": 1.0, "train.max_steps": 7, "train.learning_rate": 0.01}, "x"
    )
    in_python = AlignConfig(name="x", objective_options={"gamma": 1.0}, train=TrainConfig(max_steps=7, learning_rate=0.01))
    assert by_option == by_yaml == by_values == in_python


WRONG = {
    "missing file": (["--data.harmful", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "wrong column": (["--data.harmful", "goals.csv", "--data.benign", "empty.jsonl"], "has no column 'prompt'; it has goal"),
    "empty file": (["--data.harmful", "empty.jsonl"], "empty.jsonl has no rows"),
    "missing model": (["--base", "no-such-model"], "no base model 'no-such-model'"),
    "unknown objective": (["--objective", "magic"], "there are: bco, dpo, dro, likelihood"),
    "unknown option of an objective": (["--objective_options.beam", "3"], "unexpected keyword argument 'beam'"),
    "too many workers": (["--scale.num_workers", "99"], "cannot share"),
    "bad name": (["--name", "a/b"], "cannot be a name"),
    "no such option": (["--learning-rate", "3"], "unrecognized arguments: --learning-rate"),
    "text for a number": (["--train.max_steps", "many"], "train.max_steps"),
    "no such class": (["--train.class_weights.safe", "2"], "train.class_weights: unknown class 'safe'"),
    "weight zero": (["--train.class_weights.harmful", "0"], "train.class_weights.harmful must be above 0, not 0.0"),
    "zero steps": (["--train.max_steps", "0"], "train.max_steps must be at least 1"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


def test_wrong_use_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "goals.csv").write_text("goal\nSteal\n")
    for name, (options, expected) in WRONG.items():
        assert main(["align", *options]) == 2, name
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines, name
        assert lines[-1].startswith("trimtab: "), (name, lines)
        assert expected in lines[-1], (name, lines)
        assert not any("Traceback" in line for line in lines), name


@pytest.mark.slow
def test_own_files_a_stop_and_a_resume(small, tmp_path, capsys):
    """By the command line, as `--help` says: own files with targets, Ctrl-C, --resume, registry."""
    harmful = [f"{h}{', please' * i}" for i in range(6) for h in HARMFUL]
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": h, "target": REFUSAL}) for h in harmful))
    rows = [f'"{b}{" please" * i}","Of course! Here is all there is to know about that."' for i in range(5) for b in BENIGN]
    (tmp_path / "benign.csv").write_text("prompt,target\n" + "\n".join(rows))
    (tmp_path / "align.yaml").write_text(
        f"name: mine\nbase: {small.path}\n"
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
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    folder = settings.get_runs_folder() / "mine"
    first_checkpoint(folder, first)
    # To the whole group, as a terminal does it.
    os.killpg(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    assert "stopping after this step, with a checkpoint" in output
    assert not _left_behind(first.pid)
    resumed = [*command, "--resume", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(resumed, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*"))) == 1, "a resumed run keeps its folder"
    (run_folder,) = folder.glob("*")
    prefix = load_prefix(run_folder / "prefix")
    assert sorted(read_loss_curve(prefix.card.run_id)) == list(range(1, SHORT_STEPS + 1))
    run = get_client().get_run(prefix.card.run_id)
    assert run.info.status == "FINISHED"
    names = {d.dataset.name for d in run.inputs.dataset_inputs}
    assert names == {str(tmp_path / "harmful.jsonl"), str(tmp_path / "benign.csv")}
    assert (run_folder / "plane.png").exists()
    assert main(["list"]) == 0
    assert f"{small.name}:mine" in capsys.readouterr().out


def _left_behind(group: int) -> list[int]:
    """Processes of a group that are still there after a grace."""
    deadline = time.monotonic() + 30
    while True:
        left = [p.pid for p in psutil.process_iter() if _group(p.pid) == group]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None

"""SIGINT and SIGTERM in each phase of the commands: exit code, one line of output, no process and no partial file left."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support.align_runs import slow_steps
from tests.support.commands import END_SECONDS, RunningCommand, start_command
from tests.support.prompt_rows import write_prompt_files
from tests.support.studies import build_study_config
from trimtab.util import ports

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# By default SIGTERM during training and in the server; with TRIMTAB_SIGNALS=all both signals in all phases.
COMPLETE = os.environ.get("TRIMTAB_SIGNALS") == "all"
SIGNALS = tuple(CODES) if COMPLETE else (signal.SIGTERM,)
only_complete = pytest.mark.skipif(not COMPLETE, reason="only with TRIMTAB_SIGNALS=all")
STEPS = 20


@pytest.fixture
def align_options(tiny_base, tmp_path) -> list[str]:
    """Options of a short run whose targets must be sampled."""
    write_prompt_files(tmp_path, targets=False)
    options = ["align", "--name", "mine", "--base", str(tiny_base.path), "--train.max_steps", str(STEPS)]
    options += ["--data.harmful", str(tmp_path / "harmful.jsonl"), "--data.benign", str(tmp_path / "benign.jsonl")]
    options += ["--data.filter_rules", "[]", "--train.global_batch_size", "4", "--train.micro_batch_size", "4"]
    return [*options, "--train.checkpoint_every", "2", "--evaluate.limit", "4", "--evaluate.max_tokens", "16"]


def send_signal(command: RunningCommand, number: signal.Signals) -> None:
    """Send SIGINT to the process group, as a terminal does, or SIGTERM to the command."""
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)


def check_end(command: RunningCommand, number: signal.Signals, home: Path, line: str) -> None:
    """Check that an interrupted command ends with one line, and leaves no process and no partial file."""
    assert command.process.wait(END_SECONDS) == CODES[number], command.log.read_text()
    output = command.log.read_text()
    assert [text for text in output.splitlines() if text.startswith("trimtab: ")] == output.splitlines()[-1:], output
    assert line in output.splitlines()[-1]
    assert "Traceback" not in output
    assert "***" not in output, "a stack trace of the C++ library"
    assert command.find_remaining_processes() == []
    assert [path for path in home.rglob("*.part") if "wheels" not in path.parts] == []


@only_complete
@pytest.mark.parametrize("number", SIGNALS)
def test_download(number, home, tmp_path):
    """The package index accepts the connection and does not respond."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        connected = threading.Event()
        threading.Thread(target=lambda: (index.accept(), connected.set()), daemon=True).start()
        environment = {
            "TRIMTAB_HOME": str(tmp_path / "empty"),
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = start_command(["align", "--name", "mine"], tmp_path / "log", environment)
        command.wait_until(connected.is_set)
        send_signal(command, number)
        check_end(command, number, tmp_path, "interrupted")


def has_run_folder(home: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any((home / "runs").glob(pattern))


@only_complete
@pytest.mark.parametrize("number", SIGNALS)
def test_sampling_of_targets(number, home, align_options, tmp_path):
    command = start_command(align_options, tmp_path / "log")
    command.wait_until(lambda: command.has_worker("PooledEngine"))
    send_signal(command, number)
    check_end(command, number, home, "interrupted")


@pytest.mark.parametrize("number", SIGNALS)
def test_training_and_evaluation(number, home, align_options, tmp_path):
    """The run stops in training with a checkpoint, continues, and stops again in the evaluation."""
    with slow_steps():
        command = start_command(align_options, tmp_path / "first")
        command.wait_until(has_run_folder(home, "mine/*/train/checkpoint_*/state.json"))
        send_signal(command, number)
        check_end(command, number, home, "To resume, run the same command with --resume")
    command = start_command([*align_options, "--resume"], tmp_path / "second")
    command.wait_until(lambda: f"{STEPS}/{STEPS}" in command.log.read_text())
    command.wait_until(lambda: command.has_worker("_with_progress"))
    send_signal(command, number)
    check_end(command, number, home, "interrupted")
    assert not list((home / "runs").glob("mine/*/done"))


@only_complete
def test_study(home, tiny_base, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(build_study_config(tiny_base, tmp_path)))
    with slow_steps():
        command = start_command(["study", "--config", str(tmp_path / "study.json")], tmp_path / "log")
        for arm in ("poft#0", "sta#0"):
            command.wait_until(has_run_folder(home, f"study-tiny/{arm}/train/checkpoint_*/state.json"))
        send_signal(command, signal.SIGTERM)
        check_end(command, signal.SIGTERM, home, "Run the same command to resume")


@only_complete
def test_sweep(home, align_options, tmp_path):
    shared = {"base": align_options[4], "data": {"filter_rules": []}, "train": {"max_steps": STEPS, "checkpoint_every": 2}}
    shared["data"] |= {kind: str(tmp_path / f"{kind}.jsonl") for kind in ("harmful", "benign")}
    config = {"shared": shared, "param_space": {"train.learning_rate": [0.01, 0.1]}, "num_trials": 2}
    (tmp_path / "sweep.json").write_text(json.dumps(config))
    with slow_steps():
        command = start_command(["sweep", "--config", str(tmp_path / "sweep.json")], tmp_path / "log")
        command.wait_until(has_run_folder(home, "sweep-swept/*/train/checkpoint_*/state.json"))
        send_signal(command, signal.SIGTERM)
        check_end(command, signal.SIGTERM, home, "Run the same command to resume")


@only_complete
@pytest.mark.parametrize("number", SIGNALS)
def test_collection(number, home, tiny_base, tmp_path):
    """The command finishes its batch of 32 questions and stores it."""
    questions = [{"question": f"What is {a} plus {b}?", "answers": [str(a + b)]} for a in range(12) for b in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    options = ["collect", "--base", str(tiny_base.path), "--questions", str(tmp_path / "questions.jsonl")]
    options += ["--out", str(tmp_path / "signals"), "--num_samples", "7", "--max_tokens", "8"]
    command = start_command(options, tmp_path / "log")
    command.wait_until(lambda: list((tmp_path / "signals").glob("part-*")))
    send_signal(command, number)
    check_end(command, number, home, "answers are stored. Run the same command to resume")
    assert 0 < sum(1 for _ in (tmp_path / "signals").glob("part-*")) < len(questions) // 32


@pytest.mark.parametrize("number", SIGNALS)
def test_server_finishes_its_requests(number, home, tiny_base, tmp_path):
    port = ports.find_free_ports()[0]
    options = [
        "serve",
        "--base",
        str(tiny_base.path),
        "--port",
        str(port),
        "--detect",
        "false",
        "--engine.max_model_len",
        "2048",
    ]
    command = start_command(options, tmp_path / "log")
    command.wait_until(lambda: "press Ctrl-C to stop" in command.log.read_text())
    request = {"model": tiny_base.name, "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, json=request, timeout=END_SECONDS) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        send_signal(command, number)
        remaining = [line for line in lines if line]
    assert remaining[-1] == "data: [DONE]"
    assert len(remaining) > 200
    assert command.process.wait(END_SECONDS) == 0, command.log.read_text()
    assert command.log.read_text().splitlines()[-1] == "stopping"
    assert command.find_remaining_processes() == []


@only_complete
def test_start_of_server(home, tiny_base, tmp_path):
    command = start_command(
        ["serve", "--base", str(tiny_base.path), "--port", str(ports.find_free_ports()[0])], tmp_path / "log"
    )
    command.wait_until(lambda: command.has_worker("ServeReplica"))
    send_signal(command, signal.SIGTERM)
    assert command.process.wait(END_SECONDS) == 0, command.log.read_text()
    assert command.log.read_text().splitlines()[-1] == "stopping"
    assert command.find_remaining_processes() == []

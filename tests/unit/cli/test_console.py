"""Progress where there is no terminal: lines."""

import os
import subprocess
import sys

import pytest

from trimtab.cli import console
from trimtab.cli.console import ProgressBar
from trimtab.cli.main import main


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_the_end_is_said_once(capsys):
    with ProgressBar("answers", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().out.count("answers: 2/2") == 1


def test_the_time_left_does_not_count_what_came_before_the_first_part(capsys, clock):
    with ProgressBar("answers", 10) as bar:
        clock[0] += 100
        bar.update(1)
        clock[0] += 12
        bar.update(4)
    said = capsys.readouterr().out.splitlines()
    assert said == ["answers: 1/10 in 100 s", "answers: 4/10 in 112 s, 24 s left"]


def test_the_time_left_does_not_count_what_was_done_before(capsys, clock):
    with ProgressBar("training", 400) as bar:
        bar.skip(100)
        bar.update(100)
        clock[0] += 12
        bar.skip(150)
        bar.update(256)
    said = capsys.readouterr().out.splitlines()
    # Six in 12 seconds, and 144 to go.
    assert said == ["training: 100/400 in 0 s", "training: 256/400 in 12 s, 288 s left"]


def test_every_command_says_what_it_is_for(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "trimtab." in line and ":" in line]


def test_a_table_in_a_pipe_is_as_wide_as_it_needs():
    # pytest imports readline, which sets COLUMNS for what is started without an environment of its own.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "trimtab", "assets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "SmolLM2-135M-Instruct, the default base model (GGUF Q4_1, converted once)" in done.stdout

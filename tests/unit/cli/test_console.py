"""Console output without a terminal: progress lines, help and tables."""

import os
import subprocess
import sys

import pytest
from rich.table import Table

from trimtab.cli import console
from trimtab.cli.console import ProgressBar
from trimtab.cli.main import main


@pytest.fixture
def fake_clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_brackets_in_names_are_printed(capsys):
    table = Table("name")
    table.add_row("mine[v2]")
    console.console.print(table)
    console.print_line("refused: [/srv/x] [red]mine")
    output = capsys.readouterr().out
    assert "mine[v2]" in output
    assert "refused: [/srv/x] [red]mine" in output


def test_final_progress_is_printed_once(capsys):
    with ProgressBar("answers", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().out.count("answers: 2/2") == 1


def test_remaining_time_excludes_first_part(capsys, fake_clock):
    with ProgressBar("answers", 10) as bar:
        fake_clock[0] += 100
        bar.update(1)
        fake_clock[0] += 12
        bar.update(4)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["answers: 1/10 in 100 s", "answers: 4/10 in 112 s, 24 s left"]


def test_remaining_time_excludes_skipped_parts(capsys, fake_clock):
    with ProgressBar("training", 400) as bar:
        bar.skip(100)
        bar.update(100)
        fake_clock[0] += 12
        bar.skip(150)
        bar.update(256)
    lines = capsys.readouterr().out.splitlines()
    # Only 6 parts were done in the 12 seconds, and 144 remain.
    assert lines == ["training: 100/400 in 0 s", "training: 256/400 in 12 s, 288 s left"]


def test_help_describes_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip().startswith("align ") for line in lines)
    assert not [line for line in lines if "trimtab." in line and ":" in line]


def test_piped_table_is_not_truncated():
    # pytest imports readline, which sets COLUMNS in the environment that child processes inherit.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "trimtab", "assets"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "SmolLM2-135M-Instruct, the default base model (GGUF Q4_1, converted once)" in process.stdout


@pytest.mark.parametrize("command", ["align", "promote", "detect", "serve", "list"])
def test_help_imports_no_torch(command):
    """It would take seconds instead of a fraction of one."""
    code = f"""
import contextlib, sys
from trimtab.cli.main import main
with contextlib.suppress(SystemExit):
    main(["{command}", "--help"])
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"

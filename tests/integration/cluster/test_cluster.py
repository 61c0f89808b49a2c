"""Ray connections that fail, and tasks on the cluster that return their results in parts."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray

from tests.support.commands import check_error_line
from trimtab.cli.main import main
from trimtab.errors import JobError, UsageError
from trimtab.jobs.runtime.cluster import run_task, stream_task
from trimtab.ray_connection import connect_to_ray
from trimtab.util import ports

pytestmark = pytest.mark.usefixtures("cluster")


def yield_pid_twice(report_progress, signal_file: Path):
    """Yield the process id, and again once the file exists."""
    report_progress(1, 2)
    yield os.getpid()
    while not signal_file.exists():
        time.sleep(0.05)
    yield os.getpid()


def yield_then_fail(report_progress):
    """Yield one part, then raise a user error."""
    yield 1
    raise UsageError("row 7 has no prompt")


def add(report_progress, *numbers: int) -> int:
    """Return a result without parts."""
    return sum(numbers)


def stream_parts(function, *args):
    return stream_task("parts", f"{__name__}:{function.__name__}", *args, cpus=1, gpus=0)


def test_function_result_is_the_only_part():
    assert run_task("sum", f"{__name__}:add", 1, 2, cpus=1, gpus=0) == 3
    assert list(stream_parts(add, 1, 2)) == [3]


@pytest.mark.parametrize("timeouts", [1, 2])
def test_start_timeout_of_ray_is_repeated_once(monkeypatch, timeouts):
    attempts = []

    def time_out(**_):
        attempts.append(1)
        if len(attempts) <= timeouts:
            raise Exception("The current node timed out during startup.\nMore")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)
    if timeouts == 1:
        assert connect_to_ray(None)
    else:
        with pytest.raises(JobError, match=r"^Ray did not start on this machine: The current node timed out .* less busy$"):
            connect_to_ray(None)
    assert len(attempts) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate safety --data trimtab:pairs --base {base} --num_gpus 64", "takes 64 GPUs, and Ray has 0"),
        ("serve --base {base} --gpus_per_replica 64 --port {port}", "serving takes 64 GPUs, and Ray has 0"),
    ],
)
def test_missing_gpus_are_one_error_line(tiny_base, home, capsys, command, message):
    (port,) = ports.find_free_ports(1)
    assert main(command.format(base=tiny_base.path, port=port).split()) == 2
    check_error_line(capsys.readouterr().err, message)


def test_part_arrives_while_the_next_is_computed(tmp_path, capsys):
    parts = stream_parts(yield_pid_twice, tmp_path / "go")
    first = next(parts)
    (tmp_path / "go").touch()
    assert list(parts) == [first]
    assert "parts: " in capsys.readouterr().out


def test_killed_process_is_replaced_without_repeating_parts(tmp_path):
    parts = stream_parts(yield_pid_twice, tmp_path / "go")
    first = next(parts)
    os.kill(first, signal.SIGKILL)
    (tmp_path / "go").touch()
    (second,) = parts
    assert second != first


def test_closing_the_generator_ends_the_process(tmp_path):
    parts = stream_parts(yield_pid_twice, tmp_path / "never")
    process = psutil.Process(next(parts))
    parts.close()
    process.wait(60)


def test_error_is_raised_after_the_previous_parts():
    parts = stream_parts(yield_then_fail)
    assert next(parts) == 1
    with pytest.raises(UsageError, match=r"^row 7 has no prompt$"):
        next(parts)
    with pytest.raises(UsageError, match=r"^row 7 has no prompt$"):
        run_task("parts", f"{__name__}:yield_then_fail", cpus=1, gpus=0)

"""Ray that starts too late, and tasks on it whose parts come one by one."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray

from trimtab.errors import JobError, UsageError
from trimtab.jobs.runtime.cluster import run_task, stream_task
from trimtab.ray_connection import connect_to_ray

pytestmark = pytest.mark.usefixtures("cluster")


def waiting(tell, path: Path):
    """Yields who it is, and goes on when the file is there."""
    tell(1, 2)
    yield os.getpid()
    while not path.exists():
        time.sleep(0.05)
    yield os.getpid()


def failing(tell):
    """One part, then what the user did wrong."""
    yield 1
    raise UsageError("row 7 has no prompt")


def added(tell, *numbers: int) -> int:
    """What is made at once."""
    return sum(numbers)


def streamed(function, *args):
    return stream_task("parts", f"{__name__}:{function.__name__}", *args, cpus=1, gpus=0)


def test_what_is_made_at_once_is_the_only_part():
    assert run_task("sum", f"{__name__}:added", 1, 2, cpus=1, gpus=0) == 3
    assert list(streamed(added, 1, 2)) == [3]


def test_a_ray_that_is_not_up_in_time_is_one_line(monkeypatch):
    def late(**_):
        raise Exception("The current node timed out during startup.\nMore")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(JobError, match=r"^Ray did not start on this machine, .*: The current node timed out during startup\.$"):
        connect_to_ray(None)


def test_a_part_comes_while_the_next_is_made(tmp_path, capsys):
    parts = streamed(waiting, tmp_path / "go")
    first = next(parts)
    (tmp_path / "go").touch()
    assert list(parts) == [first]
    assert "parts: " in capsys.readouterr().out


def test_a_process_that_dies_is_replaced_and_no_part_comes_twice(tmp_path):
    parts = streamed(waiting, tmp_path / "go")
    first = next(parts)
    os.kill(first, signal.SIGKILL)
    (tmp_path / "go").touch()
    (second,) = parts
    assert second != first


def test_closing_ends_the_process(tmp_path):
    parts = streamed(waiting, tmp_path / "never")
    process = psutil.Process(next(parts))
    parts.close()
    process.wait(60)


def test_an_error_comes_after_the_parts_before_it():
    parts = streamed(failing)
    assert next(parts) == 1
    with pytest.raises(UsageError, match=r"^row 7 has no prompt$"):
        next(parts)
    with pytest.raises(UsageError, match=r"^row 7 has no prompt$"):
        run_task("parts", f"{__name__}:failing", cpus=1, gpus=0)

"""Commands in processes of their own, which a test signals."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

END_SECONDS = 120
# Maximum length of the error line of a command.
MAX_CHARACTERS = 500


@dataclass(frozen=True)
class RunningCommand:
    """Running trimtab command in its own session, with the file of its output."""

    process: subprocess.Popen
    log: Path

    def wait_until(self, condition: Callable[[], object], seconds: float = 240) -> None:
        """Wait for a condition while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def has_worker(self, name: str) -> bool:
        """Return whether a Ray process of the command has a name in its title."""
        return any(name in title for title in self._list_titles() if title.startswith("ray::"))

    def _list_titles(self) -> list[str]:
        titles = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                titles.append(" ".join(child.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return titles

    def find_remaining_processes(self) -> list[str]:
        """Return the processes of the session that still run after a grace period."""
        return find_remaining_processes(self.process.pid)


def start_command(
    arguments: list[str], log: Path, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> RunningCommand:
    """Start a trimtab command in its own session, with its output in a file; `before` is a command that executes it."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "trimtab", *arguments],
            env=os.environ | dict(environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RunningCommand(process, log)


def check_error_line(error: str, message: str) -> None:
    """Check that the error output of a command is one short line with a message."""
    assert error.startswith("trimtab: ")
    assert error.count("\n") == 1, error
    assert message in error
    assert len(error) < MAX_CHARACTERS


def can_mount(namespace: Sequence[str]) -> bool:
    """Return whether this user may mount file systems in a namespace, given by its `unshare` command."""
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    completed = subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return completed.returncode == 0


def find_remaining_processes(session: int) -> list[str]:
    """Return the processes of a session, given by its id, that still run after a grace period."""
    deadline = time.monotonic() + 30
    while True:
        remaining = [process for process in psutil.process_iter() if _get_session(process.pid) == session]
        if not remaining or time.monotonic() > deadline:
            return [str(process) for process in remaining]
        time.sleep(0.2)


def _get_session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None

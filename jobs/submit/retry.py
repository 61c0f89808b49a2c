"""Retry wrapper of submitted commands: python -m trimtab.jobs.submit.retry RETRIES -- COMMAND ..."""

import signal
import subprocess
import sys
import threading
from types import FrameType

from trimtab.cli.console import print_line
from trimtab.util.termination import INTERRUPTED, TERMINATED

# Success, usage errors and interrupts: a retry cannot change the outcome.
FINAL = (0, 2, INTERRUPTED, TERMINATED)
WAIT_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """Run a command until it ends with a final exit code or its retries are used up.

    SIGINT and SIGTERM are forwarded to the command, which is not retried afterwards.

    Args:
        arguments: number of retries, `--`, and the command.

    Returns:
        The exit code of the last attempt; 128 plus the number of the signal if a forwarded signal killed it.
    """
    retries, _, *command = arguments
    attempts, code, stop_event = int(retries) + 1, 0, threading.Event()
    for number in range(1, attempts + 1):
        code = run_once(command, stop_event)
        if stop_event.is_set():
            return code if code >= 0 else 128 - code
        if code in FINAL or number == attempts:
            break
        print_line(f"attempt {number} of {attempts} ended with exit code {code}; next attempt in {WAIT_SECONDS:.0f} s")
        if stop_event.wait(WAIT_SECONDS):
            break
    return code


def run_once(command: list[str], stop_event: threading.Event) -> int:
    """Run the command once, forward SIGINT and SIGTERM to it, and return its exit code.

    Args:
        command: command and its arguments.
        stop_event: event to set when a signal arrives.
    """
    process = subprocess.Popen(command)

    def stop(number: int, frame: FrameType | None) -> None:
        # Do not wait for the process here: the call of `wait` below already does, and must not be nested.
        stop_event.set()
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

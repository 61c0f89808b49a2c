"""Retry wrapper of submitted commands: python -m trimtab.jobs.submit.retry RETRIES -- COMMAND ..."""

import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from trimtab.cli.console import print_line

# Success, usage errors and interrupts: a retry cannot change the outcome.
INTERRUPTED = 130
FINAL = (0, 2, INTERRUPTED)
WAIT_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """Run a command until it ends with a final exit code or its retries are used up.

    Args:
        arguments: number of retries, `--`, and the command.

    Returns:
        The exit code of the last attempt.
    """
    retries, _, *command = arguments
    attempts, code = int(retries) + 1, 0
    for number in range(1, attempts + 1):
        code = run_with_retries(command)
        if code in FINAL or number == attempts:
            break
        print_line(f"attempt {number} of {attempts} ended with exit code {code}; next attempt in {WAIT_SECONDS:.0f} s")
        time.sleep(WAIT_SECONDS)
    return code


def run_with_retries(command: list[str]) -> int:
    """Run the command once and forward SIGINT and SIGTERM to it.

    Returns:
        The exit code of the command, or INTERRUPTED after a signal.
    """
    process, stopped = subprocess.Popen(command), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        # Do not wait for the process here: the call of `wait` below already does, and must not be nested.
        stopped.set()
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = process.wait()
    return INTERRUPTED if stopped.is_set() else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run a command again where it fails: python -m trimtab.jobs.again TIMES -- COMMAND ..."""

import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from trimtab.cli.console import print_line

# A command that was called wrongly, or stopped by a person, will not do better.
INTERRUPTED = 130
FINAL = (0, 2, INTERRUPTED)
WAIT_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """The exit code of the last try."""
    times, _, *command = arguments
    tries, code = int(times) + 1, 0
    for number in range(1, tries + 1):
        code = run_with_retries(command)
        if code in FINAL or number == tries:
            break
        print_line(f"try {number} of {tries} ended with exit code {code}; again in {WAIT_SECONDS:.0f} s")
        time.sleep(WAIT_SECONDS)
    return code


def run_with_retries(command: list[str]) -> int:
    """One try; what stops this process stops the command."""
    process, stopped = subprocess.Popen(command), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        # Only this: below is already being waited for the process, and twice is once too often.
        stopped.set()
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = process.wait()
    return INTERRUPTED if stopped.is_set() else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

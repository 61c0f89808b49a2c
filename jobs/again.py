"""Run a command again where it fails: python -m trimtab.jobs.again TIMES -- COMMAND ..."""

import signal
import subprocess
import sys
import time
from types import FrameType

from trimtab.console import say

# A command that was called wrongly, or stopped by a person, will not do better.
FINAL = (0, 2, 130)
WAIT_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """The exit code of the last try."""
    times, _, *command = arguments
    tries, code = int(times) + 1, 0
    for number in range(1, tries + 1):
        code = run(command)
        if code in FINAL or number == tries:
            break
        say(f"try {number} of {tries} ended with exit code {code}; again in {WAIT_SECONDS:.0f} s")
        time.sleep(WAIT_SECONDS)
    return code


def run(command: list[str]) -> int:
    """One try; what stops this process stops the command."""
    process = subprocess.Popen(command)

    def stop(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)
        process.wait()
        sys.exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Console output: progress bars on a terminal, periodic lines otherwise."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
# Without a terminal and without COLUMNS, output goes to a file or a pipe: tables are then not wrapped to 80 columns.
WIDE = 240
HAS_WIDTH = sys.stdout.isatty() or "COLUMNS" in os.environ
# Without markup: names and error messages may contain brackets.
console = Console(stderr=False, highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if HAS_WIDTH else WIDE)


def print_line(text: str) -> None:
    """Print one line of plain text."""
    console.print(text)
    sys.stdout.flush()


class ProgressBar:
    """Progress of a task, as a context manager.

    On a terminal it shows a bar, otherwise it prints a line at most every 10 seconds and at the end.

    Args:
        title: description of the task.
        total: number of steps; None if it is not known yet.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._last_line = 0.0
        self._printed = -1
        self._started = time.monotonic()
        # (steps, time) of the first update. The rate is measured from here, because the time before it includes the start-up.
        self._first_update = (0, self._started)
        self._rich = (
            RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=False,
            )
            if console.is_terminal
            else None
        )
        self._task = self._rich.add_task(title, total=total, note="") if self._rich else None

    def __enter__(self) -> Self:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rich:
            self._rich.stop()
        elif error is None and self._printed != self.done:
            self._print_status("")

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show the progress.

        Args:
            done: number of completed steps.
            total: number of steps, if it changed or has become known.
            note: text after the progress.
        """
        if done and not self._first_update[0]:
            self._first_update = (done, time.monotonic())
        self.done = done
        self.total = total if total is not None else self.total
        if self._rich and self._task is not None:
            self._rich.update(self._task, completed=done, total=self.total, note=note)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print_status(note)

    def skip(self, done: int) -> None:
        """Exclude steps of the next update from the rate, because their results existed before.

        Args:
            done: number of steps that took no time.
        """
        first, since = self._first_update
        # The rate excludes all steps of the first update anyway.
        self._first_update = (first + done, since) if first else self._first_update

    def _print_status(self, note: str) -> None:
        now, self._printed = time.monotonic(), self.done
        first, since = self._first_update
        rate = (self.done - first) / (now - since) if now > since else 0.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 and self.done < self.total else ""
        print_line(f"{self.title}: {self.done}/{self.total or '?'} in {now - self._started:.0f} s{left} {note}".rstrip())

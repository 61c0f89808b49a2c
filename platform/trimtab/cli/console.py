"""What people see while long work runs: bars on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
# Where there is no terminal nothing is too wide, unless COLUMNS says so: a file or a pipe takes tables whole.
WIDE = 240
KNOWN = sys.stdout.isatty() or "COLUMNS" in os.environ
console = Console(stderr=False, highlight=False, soft_wrap=True, width=None if KNOWN else WIDE)


def print_line(text: str) -> None:
    """One line for people."""
    console.print(text, markup=False)
    sys.stdout.flush()


class ProgressBar:
    """Progress of one piece of work, as a context manager. `total` may become known later."""

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._last = 0.0
        self._said = -1
        self._began = time.monotonic()
        # Where the first part was done: what starts before it says nothing of the rate.
        self._first = (0, self._began)
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
        elif error is None and self._said != self.done:
            self._line("")

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """So much is done."""
        if done and not self._first[0]:
            self._first = (done, time.monotonic())
        self.done = done
        self.total = total if total is not None else self.total
        if self._rich and self._task is not None:
            self._rich.update(self._task, completed=done, total=self.total, note=note)
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            self._line(note)

    def skip(self, done: int) -> None:
        """So much of what the next update counts took no work now, as it was there before: it says nothing of the rate."""
        first, since = self._first
        # Nothing of the first update counts anyhow.
        self._first = (first + done, since) if first else self._first

    def _line(self, note: str) -> None:
        now, self._said = time.monotonic(), self.done
        done, since = self._first
        rate = (self.done - done) / (now - since) if now > since else 0.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 and self.done < self.total else ""
        print_line(f"{self.title}: {self.done}/{self.total or '?'} in {now - self._began:.0f} s{left} {note}".rstrip())

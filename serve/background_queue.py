"""Bounded queue with a background thread, for work that must never delay a request."""

import threading
from collections.abc import Callable
from queue import Full, Queue
from typing import Generic, TypeVar

from prometheus_client import Counter

Item = TypeVar("Item")


class BackgroundQueue(Generic[Item]):
    """Queue whose items a thread processes. Items that do not fit are dropped and counted.

    Args:
        name: name of the thread.
        size: maximum number of waiting items.
        run: function of the thread; it ends when it takes None from the queue.
        lost: counter of dropped items.
        stop_seconds: time that `stop` waits for free space, and then for the thread.
    """

    def __init__(
        self, name: str, size: int, run: Callable[[Queue[Item | None]], None], lost: Counter, stop_seconds: float
    ) -> None:
        self._queue: Queue[Item | None] = Queue(size)
        self._lost = lost
        self._stop_seconds = stop_seconds
        self._thread = threading.Thread(target=run, args=(self._queue,), name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queue an item without blocking; drop and count it if the queue is full."""
        try:
            self._queue.put_nowait(item)
        except Full:
            self._lost.inc()

    def stop(self) -> bool:
        """Let the thread process the queued items and end; return False if there was no space for the request to end."""
        try:
            self._queue.put(None, timeout=self._stop_seconds)
        except Full:
            return False
        self._thread.join(self._stop_seconds)
        return True

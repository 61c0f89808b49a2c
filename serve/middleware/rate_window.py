"""Sliding window of events per key, for limits such as requests per minute."""

from collections import defaultdict, deque
from time import monotonic


class RateWindow:
    """Times of the events of each key within a window.

    Args:
        seconds: length of the window.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def count_event(self, key: str, most: int) -> float:
        """Count an event of a key unless the window has `most` of them.

        Returns:
            0 if the event was counted, else the seconds until the window has room.
        """
        # No change of the system time moves this clock.
        now, times = monotonic(), self._times[key]
        while times and times[0] <= now - self._seconds:
            times.popleft()
        if len(times) < most:
            times.append(now)
            return 0.0
        return times[-most] + self._seconds - now

"""The row table: which prefix is in which rows of the vocabulary, who is using it, and what may go."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from trimtab.errors import BusyError


@dataclass
class Resident:
    """A prefix in the engine. `users` counts the requests that run with it now."""

    rows: tuple[int, ...]
    users: int = 0


class RowTable:
    """Book-keeping of `count` rows that start at token id `first`. Thread-safe; knows nothing of tensors or of vLLM.

    Prefixes are known by the digest of their vectors, so two names for the same vectors share rows.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._lock = Lock()

    def acquire(self, digest: str, size: int) -> tuple[Resident, bool]:
        """A prefix with its rows for one request, and whether they must be written.

        Evicts the least recently used prefixes that no request uses where rows are short. Raises BusyError when all the
        others are in use; nothing changes then. Every call must be paired with `release`.
        """
        with self._lock:
            resident = self._residents.get(digest)
            fresh = resident is None
            if resident is None:
                resident = Resident(self._take(size))
                self._residents[digest] = resident
            resident.users += 1
            self._residents.move_to_end(digest)
            return resident, fresh

    def fits(self, digest: str, size: int) -> bool:
        """Whether a prefix that is not resident finds rows that no other has."""
        with self._lock:
            return digest not in self._residents and len(self._free) >= size

    def release(self, resident: Resident) -> None:
        """One request less uses this prefix; it stays resident, if it was not forgotten."""
        with self._lock:
            resident.users -= 1

    def forget(self, digest: str) -> None:
        """Drop a prefix whose rows could not be written, whoever had acquired it."""
        with self._lock:
            resident = self._residents.pop(digest, None)
            if resident is not None:
                self._free.extend(resident.rows)

    def residents(self) -> dict[str, Resident]:
        """A copy of what is in the engine, least recently used first."""
        with self._lock:
            return {digest: Resident(r.rows, r.users) for digest, r in self._residents.items()}

    def _take(self, size: int) -> tuple[int, ...]:
        idle = [digest for digest, r in self._residents.items() if r.users == 0]
        available = len(self._free) + sum(len(self._residents[d].rows) for d in idle)
        if available < size:
            raise BusyError(f"no {size} rows are free: all {self.count} rows hold prefixes of running requests; try again")
        for digest in idle:
            if len(self._free) >= size:
                break
            self._free.extend(self._residents.pop(digest).rows)
        return tuple(self._free.pop() for _ in range(size))

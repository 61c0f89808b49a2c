"""Prefixes in the rows of a running engine: written when they are asked for, kept while a request uses them."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine.context import Steering
from trimtab.engine.prefixes.catalog import LoadedVersion
from trimtab.errors import BusyError


@dataclass
class ResidentPrefix:
    """A prefix in the engine. `users` counts the requests that run with it now."""

    rows: tuple[int, ...]
    users: int = 0


class SlotTable:
    """Book-keeping of `count` rows that start at token id `first`. Thread-safe; knows nothing of tensors or of vLLM.

    Prefixes are known by the digest of their vectors, so two names for the same vectors share rows.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._residents: OrderedDict[str, ResidentPrefix] = OrderedDict()
        self._lock = Lock()

    def acquire_slots(self, digest: str, size: int) -> tuple[ResidentPrefix, bool]:
        """A prefix with its rows for one request, and whether they must be written.

        Evicts the least recently used prefixes that no request uses where rows are short. Raises BusyError when all the
        others are in use; nothing changes then. Every call must be paired with `release`.
        """
        with self._lock:
            resident = self._residents.get(digest)
            fresh = resident is None
            if resident is None:
                resident = ResidentPrefix(self._take_slots(size))
                self._residents[digest] = resident
            resident.users += 1
            self._residents.move_to_end(digest)
            return resident, fresh

    def has_room(self, digest: str, size: int) -> bool:
        """Whether a prefix that is not resident finds rows that no other has."""
        with self._lock:
            return digest not in self._residents and len(self._free) >= size

    def release_slots(self, resident: ResidentPrefix) -> None:
        """One request less uses this prefix; it stays resident, if it was not forgotten."""
        with self._lock:
            resident.users -= 1

    def forget_prefix(self, digest: str) -> None:
        """Drop a prefix whose rows could not be written, whoever had acquired it."""
        with self._lock:
            resident = self._residents.pop(digest, None)
            if resident is not None:
                self._free.extend(resident.rows)

    def list_residents(self) -> dict[str, ResidentPrefix]:
        """A copy of what is in the engine, least recently used first."""
        with self._lock:
            return {digest: ResidentPrefix(r.rows, r.users) for digest, r in self._residents.items()}

    def _take_slots(self, size: int) -> tuple[int, ...]:
        idle = [digest for digest, r in self._residents.items() if r.users == 0]
        available = len(self._free) + sum(len(self._residents[d].rows) for d in idle)
        if available < size:
            raise BusyError(f"no {size} rows are free: all {self.count} rows hold prefixes of running requests; try again")
        for digest in idle:
            if len(self._free) >= size:
                break
            self._free.extend(self._residents.pop(digest).rows)
        return tuple(self._free.pop() for _ in range(size))


class PrefixSlots:
    """The prefixes in the rows of a `vllm.AsyncLLM`, by its `table`."""

    def __init__(self, engine: Any, table: SlotTable) -> None:
        self._engine = engine
        self._table = table
        self._writing: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def lease_slots(self, loaded: LoadedVersion[Prefix] | None) -> AsyncGenerator[Steering | None]:
        """What steers one request while the context is open; nothing for the plain base model. Raises BusyError where all rows
        are in use."""
        if loaded is None:
            yield None
            return
        known, prefix = loaded.version, loaded.artifact
        resident, written = self._acquire_slots(prefix)
        try:
            if written:
                # So that the vectors are sent before any request that reads them.
                await asyncio.sleep(0)
            yield Steering(known.name, known.version, known.run_id, prefix.card.place, resident.rows, prefix.salt, written)
        finally:
            self._table.release_slots(resident)

    async def preload(self, prefixes: Iterable[LoadedVersion[Prefix]]) -> None:
        """Write prefixes that nobody has asked for yet, as far as there are rows that no other has."""
        for loaded in prefixes:
            if self._table.has_room(loaded.artifact.card.digest, len(loaded.artifact.vectors)):
                resident, written = self._acquire_slots(loaded.artifact)
                self._table.release_slots(resident)
                if written:
                    await written

    def count_taken(self) -> int:
        """Rows that hold prefixes now."""
        return sum(len(resident.rows) for resident in self._table.list_residents().values())

    def _acquire_slots(self, prefix: Prefix) -> tuple[ResidentPrefix, asyncio.Task[None] | None]:
        """A prefix's rows, and where its vectors are on their way there, what ends when they have come."""
        digest = prefix.card.digest
        resident, fresh = self._table.acquire_slots(digest, len(prefix.vectors))
        if fresh:
            # A user of its own, so that rows are not given away while they are written, even if nobody waits any more.
            self._table.acquire_slots(digest, len(prefix.vectors))
            self._writing[digest] = asyncio.create_task(self._write_vectors(prefix, resident))
        return resident, self._writing.get(digest)

    async def _write_vectors(self, prefix: Prefix, resident: ResidentPrefix) -> None:
        try:
            vectors = prefix.vectors.numpy().tobytes()
            await self._engine.collective_rpc("trimtab_write_vectors", args=(list(resident.rows), vectors))
        except BaseException:
            self._table.forget_prefix(prefix.card.digest)
            raise
        finally:
            self._table.release_slots(resident)
            del self._writing[prefix.card.digest]

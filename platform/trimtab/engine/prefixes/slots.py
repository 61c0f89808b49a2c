"""Allocation of embedding slots to prefixes.

Prefixes are written on demand. A prefix stays resident while a request uses it, and is evicted by least recent use afterwards.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from trimtab.artifacts.prefix import Prefix
from trimtab.engine.context import Steering
from trimtab.engine.metrics import PREFIX_WRITES
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.errors import BusyError


@dataclass
class ResidentPrefix:
    """A prefix whose slots are allocated.

    Attributes:
        slots: token ids of the slots.
        users: number of running requests that use the prefix.
    """

    slots: tuple[int, ...]
    users: int = 0


class SlotTable:
    """Allocation table of slots. Thread-safe; independent of tensors and of vLLM.

    A prefix is identified by the digest of its vectors, so that two names of the same vectors share slots.

    Args:
        first: token id of the first slot.
        count: number of slots.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._residents: OrderedDict[str, ResidentPrefix] = OrderedDict()
        self._lock = Lock()

    def acquire_slots(self, digest: str, size: int) -> tuple[ResidentPrefix, bool]:
        """Acquire the slots of a prefix for one request.

        Evicts the least recently used idle prefixes if too few slots are free. Pair every call with `release_slots`.

        Args:
            digest: digest of the prefix's vectors.
            size: number of slots of the prefix.

        Returns:
            The resident prefix, and whether its slots must be written.

        Raises:
            BusyError: if running requests use too many slots. The table is unchanged.
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
        """Return whether a prefix is not resident and fits into free slots without eviction."""
        with self._lock:
            return digest not in self._residents and len(self._free) >= size

    def release_slots(self, resident: ResidentPrefix) -> None:
        """End the use of a prefix by one request. The prefix stays resident unless it was forgotten."""
        with self._lock:
            resident.users -= 1

    def forget_prefix(self, digest: str) -> None:
        """Remove a prefix whose slots could not be written, even if requests use it."""
        with self._lock:
            resident = self._residents.pop(digest, None)
            if resident is not None:
                self._free.extend(resident.slots)

    def list_residents(self) -> dict[str, ResidentPrefix]:
        """Return a copy of the resident prefixes by digest, least recently used first."""
        with self._lock:
            return {digest: ResidentPrefix(r.slots, r.users) for digest, r in self._residents.items()}

    def _take_slots(self, size: int) -> tuple[int, ...]:
        idle = [digest for digest, r in self._residents.items() if r.users == 0]
        available = len(self._free) + sum(len(self._residents[d].slots) for d in idle)
        if available < size:
            raise BusyError(f"fewer than {size} of {self.count} slots are free: running requests use the others; try again")
        for digest in idle:
            if len(self._free) >= size:
                break
            self._free.extend(self._residents.pop(digest).slots)
        return tuple(self._free.pop() for _ in range(size))


class PrefixSlots:
    """Prefixes in the slots of a running `vllm.AsyncLLM`.

    Args:
        engine: the engine.
        table: allocation table of the engine's slots.
    """

    def __init__(self, engine: Any, table: SlotTable) -> None:
        self._engine = engine
        self._table = table
        self._writing: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def lease_slots(self, loaded: LoadedVersion[Prefix] | None) -> AsyncGenerator[Steering | None]:
        """Hold the slots of a prefix for one request while the context is open.

        Args:
            loaded: prefix of the request; None for the plain base model.

        Returns:
            Context manager that yields the request's steering; None for the plain base model.

        Raises:
            BusyError: if running requests use too many slots.
        """
        if loaded is None:
            yield None
            return
        version, prefix = loaded.version, loaded.artifact
        resident, written = self._acquire_slots(prefix)
        try:
            if written:
                # Lets the write task send the vectors before the request that reads them.
                await asyncio.sleep(0)
            card, labels = prefix.card, (version.name, version.version, version.run_id)
            yield Steering(*labels, card.position, resident.slots, prefix.salt, written, card.digest)
        finally:
            self._table.release_slots(resident)

    async def preload(self, prefixes: Iterable[LoadedVersion[Prefix]]) -> None:
        """Write prefixes into free slots before the first request for them. Skip prefixes that do not fit."""
        for loaded in prefixes:
            if self._table.has_room(loaded.artifact.card.digest, len(loaded.artifact.vectors)):
                resident, written = self._acquire_slots(loaded.artifact)
                self._table.release_slots(resident)
                if written:
                    await written

    def count_taken(self) -> int:
        """Return the number of slots that hold prefixes."""
        return sum(len(resident.slots) for resident in self._table.list_residents().values())

    def _acquire_slots(self, prefix: Prefix) -> tuple[ResidentPrefix, asyncio.Task[None] | None]:
        """Acquire a prefix's slots; return them, and the task that writes its vectors if it is still running."""
        digest = prefix.card.digest
        resident, fresh = self._table.acquire_slots(digest, len(prefix.vectors))
        if fresh:
            PREFIX_WRITES.inc()
            # The write counts as a user, so that the slots are not evicted during it even if the request has ended.
            self._table.acquire_slots(digest, len(prefix.vectors))
            self._writing[digest] = asyncio.create_task(self._write_vectors(prefix, resident))
        return resident, self._writing.get(digest)

    async def _write_vectors(self, prefix: Prefix, resident: ResidentPrefix) -> None:
        try:
            vectors = prefix.vectors.numpy().tobytes()
            await self._engine.collective_rpc("trimtab_write_vectors", args=(list(resident.slots), vectors))
        except BaseException:
            self._table.forget_prefix(prefix.card.digest)
            raise
        finally:
            self._table.release_slots(resident)
            del self._writing[prefix.card.digest]

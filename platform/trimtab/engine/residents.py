"""Prefixes in the rows of a running engine: written when they are asked for, kept while a request uses them."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from trimtab.engine.guard import Steering
from trimtab.engine.library import Loaded
from trimtab.engine.rows import Resident, RowTable
from trimtab.prefix import Prefix


class Residents:
    """The prefixes in the rows of a `vllm.AsyncLLM`, by its `table`."""

    def __init__(self, engine: Any, table: RowTable) -> None:
        self._engine = engine
        self._table = table
        self._writing: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def steered(self, loaded: Loaded[Prefix] | None) -> AsyncGenerator[Steering | None]:
        """What steers one request while the context is open; nothing for the plain base model. Raises BusyError where all rows
        are in use."""
        if loaded is None:
            yield None
            return
        known, prefix = loaded.known, loaded.part
        resident, written = self._acquire(prefix)
        try:
            if written:
                # So that the vectors are sent before any request that reads them.
                await asyncio.sleep(0)
            yield Steering(known.name, known.version, known.run_id, prefix.card.place, resident.rows, prefix.salt, written)
        finally:
            self._table.release(resident)

    async def welcome(self, prefixes: Iterable[Loaded[Prefix]]) -> None:
        """Write prefixes that nobody has asked for yet, as far as there are rows that no other has."""
        for loaded in prefixes:
            if self._table.fits(loaded.part.card.digest, len(loaded.part.vectors)):
                resident, written = self._acquire(loaded.part)
                self._table.release(resident)
                if written:
                    await written

    def taken(self) -> int:
        """Rows that hold prefixes now."""
        return sum(len(resident.rows) for resident in self._table.residents().values())

    def _acquire(self, prefix: Prefix) -> tuple[Resident, asyncio.Task[None] | None]:
        """A prefix's rows, and where its vectors are on their way there, what ends when they have come."""
        digest = prefix.card.digest
        resident, fresh = self._table.acquire(digest, len(prefix.vectors))
        if fresh:
            # A user of its own, so that rows are not given away while they are written, even if nobody waits any more.
            self._table.acquire(digest, len(prefix.vectors))
            self._writing[digest] = asyncio.create_task(self._write(prefix, resident))
        return resident, self._writing.get(digest)

    async def _write(self, prefix: Prefix, resident: Resident) -> None:
        try:
            vectors = prefix.vectors.numpy().tobytes()
            await self._engine.collective_rpc("trimtab_write", args=(list(resident.rows), vectors))
        except BaseException:
            self._table.forget(prefix.card.digest)
            raise
        finally:
            self._table.release(resident)
            del self._writing[prefix.card.digest]

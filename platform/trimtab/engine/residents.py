"""Prefixes in the rows of a running engine: written when they are asked for, kept while a request uses them."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from trimtab.engine.guard import Steering
from trimtab.engine.library import Loaded
from trimtab.engine.rows import RowTable
from trimtab.prefix import Prefix


class Residents:
    """The prefixes in the rows of a `vllm.AsyncLLM`, by its `table`."""

    def __init__(self, engine: Any, table: RowTable) -> None:
        self._engine = engine
        self._table = table
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def steered(self, loaded: Loaded[Prefix] | None) -> AsyncGenerator[Steering | None]:
        """What steers one request while the context is open; nothing for the plain base model. Raises BusyError where all rows
        are in use."""
        if loaded is None:
            yield None
            return
        rows, (known, prefix) = await self._acquire(loaded.part), (loaded.known, loaded.part)
        try:
            yield Steering(known.name, known.version, known.run_id, prefix.card.place, rows, prefix.salt)
        finally:
            self._table.release(prefix.card.digest)

    async def welcome(self, prefixes: Iterable[Loaded[Prefix]]) -> None:
        """Write prefixes that nobody has asked for yet, as far as there are rows that no other has."""
        for loaded in prefixes:
            if self._table.fits(loaded.part.card.digest, len(loaded.part.vectors)):
                await self._acquire(loaded.part)
                self._table.release(loaded.part.card.digest)

    def taken(self) -> int:
        """Rows that hold prefixes now."""
        return sum(len(resident.rows) for resident in self._table.residents().values())

    async def _acquire(self, prefix: Prefix) -> tuple[int, ...]:
        digest = prefix.card.digest
        # Under the lock, so that nobody runs with rows that another request is still writing.
        async with self._writing:
            rows, fresh = self._table.acquire(digest, len(prefix.vectors))
            if fresh:
                try:
                    vectors = prefix.vectors.numpy().tobytes()
                    await self._engine.collective_rpc("trimtab_write", args=(list(rows), vectors))
                except BaseException:
                    self._table.forget(digest)
                    raise
        return rows

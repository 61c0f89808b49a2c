"""Prefixes on their way into the rows of an engine, in any order of requests (the engine is a wire that holds things back)."""

import asyncio

import pytest
import torch

from trimtab.artifacts import prefix
from trimtab.artifacts.card import Card
from trimtab.artifacts.prefix import Prefix
from trimtab.engine.prefixes.catalog import Known, Loaded
from trimtab.engine.prefixes.slots import Residents, RowTable
from trimtab.errors import BusyError


class Wire:
    """Counts what is sent; nothing arrives before `arrives` is set, or it fails."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.arrives = asyncio.Event()
        self.broken = False

    async def collective_rpc(self, name: str, args: tuple[list[int], bytes]) -> None:
        self.sent.append(args[0])
        await self.arrives.wait()
        if self.broken:
            raise ConnectionError("the engine is gone")


def some(number: int) -> Loaded[Prefix]:
    card = Card("prefix", f"p{number}", "base", "fingerprint", "start", 1, 4, "")
    return Loaded(Known(card.name, 1, None), prefix.make(torch.full((1, 4), float(number)), card))


def test_prefixes_are_sent_together_and_once_each():
    async def run() -> None:
        wire = Wire()
        residents = Residents(wire, RowTable(100, 4))
        async with residents.steered(some(1)) as one, residents.steered(some(2)) as two, residents.steered(some(1)) as again:
            assert sorted(wire.sent) == [[100], [101]], "nobody waits for another's vectors, and the same go once"
            assert one.rows == again.rows != two.rows
            wire.arrives.set()
            await asyncio.gather(one.written, two.written, again.written)
            async with residents.steered(some(1)) as later:
                assert later.written is None

    asyncio.run(run())


def test_rows_on_their_way_are_nobody_elses_even_if_the_request_has_gone():
    async def run() -> None:
        wire = Wire()
        residents = Residents(wire, RowTable(100, 1))
        async with residents.steered(some(1)) as gone:
            pass
        with pytest.raises(BusyError):
            async with residents.steered(some(2)):
                pass
        wire.arrives.set()
        await gone.written
        async with residents.steered(some(2)) as now:
            assert now.rows == (100,)

    asyncio.run(run())


def test_what_did_not_arrive_is_sent_again():
    async def run() -> None:
        wire = Wire()
        wire.broken = True
        wire.arrives.set()
        residents = Residents(wire, RowTable(100, 1))
        async with residents.steered(some(1)) as one:
            with pytest.raises(ConnectionError):
                await one.written
        wire.broken = False
        async with residents.steered(some(1)) as one:
            await one.written
        assert wire.sent == [[100], [100]]

    asyncio.run(run())

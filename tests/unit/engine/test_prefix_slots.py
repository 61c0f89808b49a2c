"""The row table under any order of requests: no row serves two prefixes, nothing in use is taken away."""

import asyncio
import random

import pytest
import torch

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix
from trimtab.engine.prefixes.catalog import LoadedVersion, RegisteredVersion
from trimtab.engine.prefixes.slots import PrefixSlots, ResidentPrefix, SlotTable
from trimtab.errors import BusyError


def test_same_prefix_shares_rows_and_is_written_once():
    table = SlotTable(100, 4)
    resident, fresh = table.acquire_slots("a", 2)
    assert fresh
    again, fresh = table.acquire_slots("a", 2)
    assert again.slots == resident.slots
    assert not fresh


def test_least_recently_used_idle_prefix_goes_first():
    table = SlotTable(100, 3)
    for digest in "abc":
        table.release_slots(table.acquire_slots(digest, 1)[0])
    table.release_slots(table.acquire_slots("a", 1)[0])
    table.acquire_slots("d", 1)
    assert set(table.list_residents()) == {"c", "a", "d"}


def test_what_is_in_use_stays_and_the_caller_is_told():
    table = SlotTable(100, 2)
    first, _ = table.acquire_slots("a", 1)
    table.acquire_slots("b", 1)
    with pytest.raises(BusyError, match="try again"):
        table.acquire_slots("c", 1)
    assert set(table.list_residents()) == {"a", "b"}
    table.release_slots(first)
    assert table.acquire_slots("c", 1)[1]


def test_forget_gives_rows_back():
    table = SlotTable(100, 1)
    failed, _ = table.acquire_slots("a", 1)
    table.forget_prefix("a")
    other, fresh = table.acquire_slots("b", 1)
    assert (other.slots, fresh) == ((100,), True)
    table.release_slots(failed)
    assert table.list_residents()["b"].users == 1, "who used what is forgotten takes nothing from others"


def test_random_traffic_never_shares_a_row():
    choose = random.Random(0)
    table = SlotTable(1000, 16)
    sizes = {f"p{i}": choose.randint(1, 4) for i in range(20)}
    running: list[tuple[str, ResidentPrefix]] = []
    for _ in range(3000):
        if running and choose.random() < 0.5:
            table.release_slots(running.pop(choose.randrange(len(running)))[1])
            continue
        digest = choose.choice(list(sizes))
        used = [digest for digest, _ in running]
        before = {d: table.list_residents()[d].slots for d in set(used)}
        try:
            resident, _ = table.acquire_slots(digest, sizes[digest])
        except BusyError:
            assert sum(sizes[d] for d in set(used)) + sizes[digest] > 16
            continue
        running.append((digest, resident))
        residents = table.list_residents()
        assert len(resident.slots) == sizes[digest]
        assert all(residents[d].slots == r for d, r in before.items()), "rows of a running request moved"
        taken = [row for r in residents.values() for row in r.slots]
        assert len(taken) == len(set(taken))
        assert all(1000 <= row < 1016 for row in taken)
        assert all(r.users == [name for name, _ in running].count(d) for d, r in residents.items())


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


def some(number: int) -> LoadedVersion[Prefix]:
    card = PrefixCard("prefix", f"p{number}", "base", "fingerprint", "start", 1, 4, "")
    return LoadedVersion(RegisteredVersion(card.name, 1, None), build_prefix(torch.full((1, 4), float(number)), card))


def test_prefixes_are_sent_together_and_once_each():
    async def run() -> None:
        wire = Wire()
        residents = PrefixSlots(wire, SlotTable(100, 4))
        async with (
            residents.lease_slots(some(1)) as one,
            residents.lease_slots(some(2)) as two,
            residents.lease_slots(some(1)) as again,
        ):
            assert sorted(wire.sent) == [[100], [101]], "nobody waits for another's vectors, and the same go once"
            assert one.slots == again.slots != two.slots
            wire.arrives.set()
            await asyncio.gather(one.written, two.written, again.written)
            async with residents.lease_slots(some(1)) as later:
                assert later.written is None

    asyncio.run(run())


def test_rows_on_their_way_are_nobody_elses_even_if_the_request_has_gone():
    async def run() -> None:
        wire = Wire()
        residents = PrefixSlots(wire, SlotTable(100, 1))
        async with residents.lease_slots(some(1)) as gone:
            pass
        with pytest.raises(BusyError):
            async with residents.lease_slots(some(2)):
                pass
        wire.arrives.set()
        await gone.written
        async with residents.lease_slots(some(2)) as now:
            assert now.slots == (100,)

    asyncio.run(run())


def test_what_did_not_arrive_is_sent_again():
    async def run() -> None:
        wire = Wire()
        wire.broken = True
        wire.arrives.set()
        residents = PrefixSlots(wire, SlotTable(100, 1))
        async with residents.lease_slots(some(1)) as one:
            with pytest.raises(ConnectionError):
                await one.written
        wire.broken = False
        async with residents.lease_slots(some(1)) as one:
            await one.written
        assert wire.sent == [[100], [100]]

    asyncio.run(run())

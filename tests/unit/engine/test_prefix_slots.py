"""Slots of resident prefixes: allocation, eviction, leases and transfers to the engine."""

import asyncio
import random

import pytest
import torch

from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix
from trimtab.engine.prefixes.slots import PrefixSlots, ResidentPrefix, SlotTable
from trimtab.engine.prefixes.version_loader import LoadedVersion, RegisteredVersion
from trimtab.errors import BusyError


def test_same_prefix_shares_slots_and_is_written_once():
    table = SlotTable(100, 4)
    resident, fresh = table.acquire_slots("a", 2)
    assert fresh
    shared, fresh = table.acquire_slots("a", 2)
    assert shared.slots == resident.slots
    assert not fresh


def test_least_recently_used_idle_prefix_is_evicted():
    table = SlotTable(100, 3)
    for digest in "abc":
        table.release_slots(table.acquire_slots(digest, 1)[0])
    table.release_slots(table.acquire_slots("a", 1)[0])
    table.acquire_slots("d", 1)
    assert set(table.list_residents()) == {"c", "a", "d"}


def test_prefix_in_use_is_not_evicted():
    table = SlotTable(100, 2)
    first, _ = table.acquire_slots("a", 1)
    table.acquire_slots("b", 1)
    with pytest.raises(BusyError, match="try again"):
        table.acquire_slots("c", 1)
    assert set(table.list_residents()) == {"a", "b"}
    table.release_slots(first)
    assert table.acquire_slots("c", 1)[1]


def test_forgetting_a_prefix_frees_its_slots():
    table = SlotTable(100, 1)
    failed, _ = table.acquire_slots("a", 1)
    table.forget_prefix("a")
    other, fresh = table.acquire_slots("b", 1)
    assert (other.slots, fresh) == ((100,), True)
    table.release_slots(failed)
    assert table.list_residents()["b"].users == 1, "the release of a forgotten prefix must not affect others"


def test_room_is_free_slots_for_a_new_prefix():
    table = SlotTable(100, 3)
    table.acquire_slots("a", 2)
    assert table.has_room("b", 1)
    assert not table.has_room("b", 2), "slots of another prefix are no room"
    assert not table.has_room("a", 1), "a resident prefix needs no room"


def test_random_traffic_never_shares_a_slot():
    choose = random.Random(0)
    table = SlotTable(1000, 16)
    sizes = {f"p{i}": choose.randint(1, 4) for i in range(20)}
    running: list[tuple[str, ResidentPrefix]] = []
    for _ in range(3000):
        if running and choose.random() < 0.5:
            table.release_slots(running.pop(choose.randrange(len(running)))[1])
            continue
        digest = choose.choice(list(sizes))
        used_digests = [digest for digest, _ in running]
        before = {d: table.list_residents()[d].slots for d in set(used_digests)}
        try:
            resident, _ = table.acquire_slots(digest, sizes[digest])
        except BusyError:
            assert sum(sizes[d] for d in set(used_digests)) + sizes[digest] > 16
            continue
        running.append((digest, resident))
        residents = table.list_residents()
        assert len(resident.slots) == sizes[digest]
        assert all(residents[d].slots == r for d, r in before.items()), "slots of a running request moved"
        allocated = [row for r in residents.values() for row in r.slots]
        assert len(allocated) == len(set(allocated))
        assert all(1000 <= row < 1016 for row in allocated)
        assert all(r.users == [name for name, _ in running].count(d) for d, r in residents.items())


class FakeWorkers:
    """Engine workers that record transfers. A transfer ends once `delivered` is set, and fails if `failing`."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.delivered = asyncio.Event()
        self.failing = False

    async def collective_rpc(self, name: str, args: tuple[list[int], bytes]) -> None:
        self.sent.append(args[0])
        await self.delivered.wait()
        if self.failing:
            raise ConnectionError("the engine is gone")


def create_version(number: int) -> LoadedVersion[Prefix]:
    card = PrefixCard("prefix", f"p{number}", "base", "fingerprint", "start", 1, 4, "")
    return LoadedVersion(RegisteredVersion(card.name, 1, None), build_prefix(torch.full((1, 4), float(number)), card))


def test_prefixes_are_sent_concurrently_and_once():
    async def run() -> None:
        workers = FakeWorkers()
        residents = PrefixSlots(workers, SlotTable(100, 4))
        async with (
            residents.lease_slots(create_version(1)) as first,
            residents.lease_slots(create_version(2)) as second,
            residents.lease_slots(create_version(1)) as repeated,
        ):
            assert sorted(workers.sent) == [[100], [101]], "transfers must run concurrently, one for each prefix"
            assert first.slots == repeated.slots != second.slots
            workers.delivered.set()
            await asyncio.gather(first.written, second.written, repeated.written)
            async with residents.lease_slots(create_version(1)) as later:
                assert later.written is None

    asyncio.run(run())


def test_slots_in_transfer_stay_reserved_without_a_request():
    async def run() -> None:
        workers = FakeWorkers()
        residents = PrefixSlots(workers, SlotTable(100, 1))
        async with residents.lease_slots(create_version(1)) as ended:
            pass
        with pytest.raises(BusyError):
            async with residents.lease_slots(create_version(2)):
                pass
        workers.delivered.set()
        await ended.written
        async with residents.lease_slots(create_version(2)) as lease:
            assert lease.slots == (100,)

    asyncio.run(run())


def test_failed_transfer_is_repeated():
    async def run() -> None:
        workers = FakeWorkers()
        workers.failing = True
        workers.delivered.set()
        residents = PrefixSlots(workers, SlotTable(100, 1))
        async with residents.lease_slots(create_version(1)) as lease:
            with pytest.raises(ConnectionError):
                await lease.written
        workers.failing = False
        async with residents.lease_slots(create_version(1)) as lease:
            await lease.written
        assert workers.sent == [[100], [100]]

    asyncio.run(run())


def test_preload_writes_the_prefixes_that_fit():
    async def run() -> None:
        workers = FakeWorkers()
        residents = PrefixSlots(workers, SlotTable(100, 2))
        preload = asyncio.create_task(residents.preload(create_version(number) for number in (1, 1, 2, 3)))
        while not workers.sent:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not preload.done(), "a prefix is ready when its vectors have arrived"
        assert residents.count_taken() == 1
        workers.delivered.set()
        await preload
        assert workers.sent == [[100], [101]]
        assert residents.count_taken() == 2
        # The slots are idle, and a request can have them.
        async with residents.lease_slots(create_version(3)):
            assert residents.count_taken() == 2

    asyncio.run(run())


def test_request_without_a_prefix_has_no_slots():
    async def run() -> None:
        async with PrefixSlots(FakeWorkers(), SlotTable(100, 1)).lease_slots(None) as lease:
            assert lease is None

    asyncio.run(run())

"""The row table under any order of requests: no row serves two prefixes, nothing in use is taken away."""

import random

import pytest

from trimtab.engine.prefixes.slots import Resident, RowTable
from trimtab.errors import BusyError


def test_same_prefix_shares_rows_and_is_written_once():
    table = RowTable(100, 4)
    resident, fresh = table.acquire("a", 2)
    assert fresh
    again, fresh = table.acquire("a", 2)
    assert again.rows == resident.rows
    assert not fresh


def test_least_recently_used_idle_prefix_goes_first():
    table = RowTable(100, 3)
    for digest in "abc":
        table.release(table.acquire(digest, 1)[0])
    table.release(table.acquire("a", 1)[0])
    table.acquire("d", 1)
    assert set(table.residents()) == {"c", "a", "d"}


def test_what_is_in_use_stays_and_the_caller_is_told():
    table = RowTable(100, 2)
    first, _ = table.acquire("a", 1)
    table.acquire("b", 1)
    with pytest.raises(BusyError, match="try again"):
        table.acquire("c", 1)
    assert set(table.residents()) == {"a", "b"}
    table.release(first)
    assert table.acquire("c", 1)[1]


def test_forget_gives_rows_back():
    table = RowTable(100, 1)
    failed, _ = table.acquire("a", 1)
    table.forget("a")
    other, fresh = table.acquire("b", 1)
    assert (other.rows, fresh) == ((100,), True)
    table.release(failed)
    assert table.residents()["b"].users == 1, "who used what is forgotten takes nothing from others"


def test_random_traffic_never_shares_a_row():
    choose = random.Random(0)
    table = RowTable(1000, 16)
    sizes = {f"p{i}": choose.randint(1, 4) for i in range(20)}
    running: list[tuple[str, Resident]] = []
    for _ in range(3000):
        if running and choose.random() < 0.5:
            table.release(running.pop(choose.randrange(len(running)))[1])
            continue
        digest = choose.choice(list(sizes))
        used = [digest for digest, _ in running]
        before = {d: table.residents()[d].rows for d in set(used)}
        try:
            resident, _ = table.acquire(digest, sizes[digest])
        except BusyError:
            assert sum(sizes[d] for d in set(used)) + sizes[digest] > 16
            continue
        running.append((digest, resident))
        residents = table.residents()
        assert len(resident.rows) == sizes[digest]
        assert all(residents[d].rows == r for d, r in before.items()), "rows of a running request moved"
        taken = [row for r in residents.values() for row in r.rows]
        assert len(taken) == len(set(taken))
        assert all(1000 <= row < 1016 for row in taken)
        assert all(r.users == [name for name, _ in running].count(d) for d, r in residents.items())

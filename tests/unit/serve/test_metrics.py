"""Metrics are collected once for simultaneous readers, and rarely where a collection is slow."""

import asyncio
import threading

from trimtab.serve import metrics
from trimtab.serve.metrics import CachedMetrics


def test_simultaneous_readers_share_a_slow_collection(monkeypatch):
    monkeypatch.setattr(metrics, "COLLECTING", 1e-9)
    calls: list[int] = []

    def collect() -> bytes:
        calls.append(threading.get_ident())
        return b"metrics"

    async def read() -> list[bytes]:
        cache = CachedMetrics(collect)
        return await asyncio.gather(*(cache.get() for _ in range(50)))

    assert asyncio.run(read()) == [b"metrics"] * 50
    assert len(calls) == 1
    assert calls[0] != threading.get_ident(), "the event loop must not wait for a collection"


def test_metrics_are_collected_again(monkeypatch):
    monkeypatch.setattr(metrics, "COLLECTING", float("inf"))
    bodies = iter((b"first", b"second"))

    async def read() -> list[bytes]:
        cache = CachedMetrics(lambda: next(bodies))
        return [await cache.get(), await cache.get()]

    assert asyncio.run(read()) == [b"first", b"second"]

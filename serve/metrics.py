"""Metrics of a server in the Prometheus text format: merged over its replicas, and cached."""

import asyncio
import time
from collections.abc import Callable, Generator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

# Maximum share of the time spent on collecting metrics. With a thousand prefixes, one collection takes seconds.
COLLECTING = 0.1


class CachedMetrics:
    """Metrics that one thread at a time collects, and no more often than COLLECTING allows.

    Args:
        collect: function that returns the metrics; runs in a thread.
    """

    def __init__(self, collect: Callable[[], bytes]) -> None:
        self._collect = collect
        self._lock = asyncio.Lock()
        self._body = b""
        self._next = 0.0

    async def get(self) -> bytes:
        """Return the metrics, which are as old as several collections at most."""
        async with self._lock:
            if (began := time.monotonic()) >= self._next:
                self._body = await asyncio.to_thread(self._collect)
                ended = time.monotonic()
                self._next = ended + (ended - began) / COLLECTING
        return self._body


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Merge the metrics of several replicas.

    Args:
        texts: metrics in the Prometheus text format by replica id.

    Returns:
        Merged metrics in the same format, each sample with a `replica` label.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families:
    """Prometheus collector of fixed metric families."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Generator[Metric]:
        yield from self._families

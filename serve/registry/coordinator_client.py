"""A replica's line to the others: what they agreed to answer with, and their metrics."""

import asyncio
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from trimtab.engine.prefixes.catalog import AliasVersions, VersionNames
from trimtab.errors import JobError

# Whoever collects metrics looks every 15 s or so.
METRICS_SECONDS = 5.0


class CoordinatorClient:
    """The replica `me` among those that tell an `agreement`, the handle of a deployment of that class."""

    def __init__(self, agreement: Any, me: str) -> None:
        self._agreement = agreement
        self._me = me
        self._metrics: Mapping[str, str] = {}
        self._shared_at = -METRICS_SECONDS

    async def agree(self, names: VersionNames) -> VersionNames:
        """Say what this replica could answer with; what all of them can is what it is to answer with. Raises JobError where
        nobody hears it."""
        try:
            agreed = await self._agreement.report.remote(self._me, names)
            if time.monotonic() - self._shared_at >= METRICS_SECONDS:
                # In a thread: of a thousand prefixes it takes as long as some tokens.
                own = await asyncio.to_thread(generate_latest, REGISTRY)
                self._metrics = await self._agreement.exchange_metrics.remote(self._me, own.decode())
                self._shared_at = time.monotonic()
        except (RayError, RayServeException) as error:
            raise JobError(f"the other replicas cannot be reached: {error}") from error
        return agreed

    async def get_agreed_versions(self, kind: str) -> AliasVersions:
        """What the others answer with; nothing where there are none."""
        with suppress(RayError, RayServeException):
            return await self._agreement.get_agreed_versions.remote(kind)
        return {}

    async def leave(self) -> None:
        """Say that this replica stops."""
        with suppress(RayError, RayServeException):
            await self._agreement.leave.remote(self._me)

    def metrics(self) -> bytes:
        """The metrics of all replicas, those of the others some seconds old, each sample with its `replica`."""
        return merge_metrics({**self._metrics, self._me: generate_latest(REGISTRY).decode()})


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """One exposition of several, by replica."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            held = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            held.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families:
    """What Prometheus' library calls a collector."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Generator[Metric]:
        yield from self._families

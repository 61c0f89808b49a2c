"""Client of the coordinator: agreed versions and metrics of the other replicas."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from trimtab.engine.prefixes.catalog import AliasVersions, VersionNames
from trimtab.errors import JobError
from trimtab.serve.metrics import merge_metrics

# Prometheus typically scrapes every 15 s.
METRICS_SECONDS = 5.0


class CoordinatorClient:
    """Connection of one replica to the coordinator.

    Args:
        coordinator: Serve handle of the `VersionCoordinator` deployment.
        replica: id of this replica.
    """

    def __init__(self, coordinator: Any, replica: str) -> None:
        self._coordinator = coordinator
        self._replica = replica
        self._metrics: Mapping[str, str] = {}
        self._shared_at = -METRICS_SECONDS

    async def agree(self, names: VersionNames) -> VersionNames:
        """Report the versions of this replica and exchange metrics if they are METRICS_SECONDS old.

        Args:
            names: versions that this replica has loaded or refused.

        Returns:
            Agreed versions, which this replica must serve.

        Raises:
            JobError: if the coordinator is not available.
        """
        try:
            agreed = await self._coordinator.report.remote(self._replica, names)
            if time.monotonic() - self._shared_at >= METRICS_SECONDS:
                # In a thread: with a thousand prefixes, this takes as long as generating several tokens.
                metrics = await asyncio.to_thread(generate_latest, REGISTRY)
                self._metrics = await self._coordinator.exchange_metrics.remote(self._replica, metrics.decode())
                self._shared_at = time.monotonic()
        except (RayError, RayServeException) as error:
            raise JobError(f"coordinator of the replicas not available: {error}") from error
        return agreed

    async def get_agreed_versions(self, kind: str) -> AliasVersions:
        """Return the versions that the other replicas serve; empty if there are none."""
        with suppress(RayError, RayServeException):
            return await self._coordinator.get_agreed_versions.remote(kind)
        return {}

    async def leave(self) -> None:
        """Notify the coordinator that this replica stops."""
        with suppress(RayError, RayServeException):
            await self._coordinator.leave.remote(self._replica)

    def collect_metrics(self) -> bytes:
        """Return the metrics of all replicas in the Prometheus text format, each sample with a `replica` label.

        Metrics of the other replicas are a few seconds old.
        """
        return merge_metrics({**self._metrics, self._replica: generate_latest(REGISTRY).decode()})

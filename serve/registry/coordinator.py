"""Coordinator of the served versions: an alias moves once every replica has loaded the new version."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.engine.prefixes.catalog import VersionNames

# A replica without a report for this time counts as gone, so that it cannot block the others.
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class ReportedNames:
    """Last report of a replica.

    Attributes:
        at: time of the report (seconds, monotonic clock).
        names: versions that the replica has loaded or refused.
    """

    at: float
    names: VersionNames


class VersionCoordinator:
    """Deployment that computes the agreed versions from the reports of all replicas, one per second and replica."""

    def __init__(self) -> None:
        self._reports: dict[str, ReportedNames] = {}
        self._agreed: dict[str, dict[tuple[str, str], int]] = {}
        self._metrics: dict[str, str] = {}

    async def report(self, replica: str, names: VersionNames) -> VersionNames:
        """Store the report of a replica and return the agreed versions.

        Args:
            replica: id of the replica.
            names: versions that the replica has loaded or refused.

        Returns:
            Versions that all replicas have loaded, and the refused versions of any replica.
        """
        now = time.monotonic()
        self._reports = {r: report for r, report in self._reports.items() if now - report.at < GONE_SECONDS}
        self._reports[replica] = ReportedNames(now, names)
        reported = [report.names for report in self._reports.values()]
        self._agreed = {
            kind: compute_agreement([r.aliases[kind] for r in reported], self._agreed.get(kind, {})) for kind in names.aliases
        }
        refused = {
            kind: {version: reason for r in reported for version, reason in r.refused.get(kind, {}).items()}
            for kind in names.aliases
        }
        return VersionNames(self._agreed, refused)

    async def exchange_metrics(self, replica: str, metrics: str) -> dict[str, str]:
        """Store the metrics of a replica and return those of the other live replicas.

        Args:
            replica: id of the replica.
            metrics: metrics in the Prometheus text format.

        Returns:
            Metrics of the other replicas by replica id.
        """
        self._metrics = {r: text for r, text in self._metrics.items() if r in self._reports} | {replica: metrics}
        return {r: text for r, text in self._metrics.items() if r != replica}

    async def get_agreed_versions(self, kind: str) -> dict[tuple[str, str], int]:
        """Return the agreed versions of a kind by (name, alias); used by a replica that starts."""
        return self._agreed.get(kind, {})

    async def leave(self, replica: str) -> None:
        """Remove a replica that stops, so that the others do not wait for it."""
        self._reports.pop(replica, None)


def compute_agreement(
    reported: list[Mapping[tuple[str, str], int]], previous: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    """Return the agreed version of each alias.

    Args:
        reported: versions by (name, alias) of each replica.
        previous: versions that were agreed before.

    Returns:
        Versions by (name, alias): the version that all replicas report, else the previous one. An alias that no replica reports
        is left out.
    """
    agreed: dict[tuple[str, str], int] = {}
    for key in {key for aliases in reported for key in aliases}:
        versions = {aliases.get(key) for aliases in reported}
        version = versions.pop() if len(versions) == 1 else previous.get(key)
        if version is not None:
            agreed[key] = version
    return agreed

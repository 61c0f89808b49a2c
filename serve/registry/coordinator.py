"""What all replicas of a server answer with: an alias moves once every one of them has its version."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.engine.prefixes.catalog import VersionNames

# A replica that has not been heard of for so long is gone: the others do not wait for it.
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class ReportedNames:
    """What a replica said last that it could answer with."""

    at: float
    names: VersionNames


class VersionCoordinator:
    """Serve runs one of these beside the replicas; each tells it every second what it could answer with."""

    def __init__(self) -> None:
        self._heard: dict[str, ReportedNames] = {}
        self._agreed: dict[str, dict[tuple[str, str], int]] = {}
        self._metrics: dict[str, str] = {}

    async def report(self, replica: str, names: VersionNames) -> VersionNames:
        """Hear what a replica could answer with; tell it what all of them can."""
        now = time.monotonic()
        self._heard = {r: heard for r, heard in self._heard.items() if now - heard.at < GONE_SECONDS}
        self._heard[replica] = ReportedNames(now, names)
        said = [heard.names for heard in self._heard.values()]
        self._agreed = {
            kind: compute_agreement([one.aliases[kind] for one in said], self._agreed.get(kind, {})) for kind in names.aliases
        }
        refused = {kind: {k: why for one in said for k, why in one.refused.get(kind, {}).items()} for kind in names.aliases}
        return VersionNames(self._agreed, refused)

    async def exchange_metrics(self, replica: str, metrics: str) -> dict[str, str]:
        """Keep a replica's metrics, as Prometheus reads them; give it those of the others that are there, by replica."""
        self._metrics = {r: said for r, said in self._metrics.items() if r in self._heard} | {replica: metrics}
        return {r: said for r, said in self._metrics.items() if r != replica}

    async def get_agreed_versions(self, kind: str) -> dict[tuple[str, str], int]:
        """What those that are there answer with, for one that comes."""
        return self._agreed.get(kind, {})

    async def leave(self, replica: str) -> None:
        """A replica stops: nobody waits for it any more."""
        self._heard.pop(replica, None)


def compute_agreement(
    said: list[Mapping[tuple[str, str], int]], before: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    """For each alias the version that all of them name, else the one before; an alias that none of them names is gone."""
    found: dict[tuple[str, str], int] = {}
    for key in {key for one in said for key in one}:
        versions = {one.get(key) for one in said}
        version = versions.pop() if len(versions) == 1 else before.get(key)
        if version is not None:
            found[key] = version
    return found

"""What all replicas of a server answer with: an alias moves once every one of them has its version."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.engine.library import Names

# A replica that has not been heard of for so long is gone: the others do not wait for it.
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Heard:
    """What a replica said last: what it could answer with, and its metrics as Prometheus reads them."""

    at: float
    names: Names
    metrics: str


@dataclass(frozen=True)
class Told:
    """What a replica is told: what to answer with, and where it said its own, the metrics of the others by replica."""

    names: Names
    metrics: Mapping[str, str] | None


class Agreement:
    """Serve runs one of these beside the replicas; each tells it every second what it could answer with."""

    def __init__(self) -> None:
        self._heard: dict[str, Heard] = {}
        self._agreed: dict[str, dict[tuple[str, str], int]] = {}

    async def tell(self, replica: str, names: Names, metrics: str | None) -> Told:
        """Hear what a replica could answer with; tell it what all of them can, and the others' metrics for its own."""
        now = time.monotonic()
        self._heard = {r: heard for r, heard in self._heard.items() if now - heard.at < GONE_SECONDS}
        before = self._heard.get(replica)
        known = metrics if metrics is not None else before.metrics if before else ""
        self._heard[replica] = Heard(now, names, known)
        said = [heard.names for heard in self._heard.values()]
        self._agreed = {kind: agreed([one.aliases[kind] for one in said], self._agreed.get(kind, {})) for kind in names.aliases}
        refused = {kind: {k: why for one in said for k, why in one.refused.get(kind, {}).items()} for kind in names.aliases}
        others = {r: heard.metrics for r, heard in self._heard.items() if r != replica}
        return Told(Names(self._agreed, refused), None if metrics is None else others)

    async def agreed_on(self, kind: str) -> dict[tuple[str, str], int]:
        """What those that are there answer with, for one that comes."""
        return self._agreed.get(kind, {})

    async def leave(self, replica: str) -> None:
        """A replica stops: nobody waits for it any more."""
        self._heard.pop(replica, None)


def agreed(said: list[Mapping[tuple[str, str], int]], before: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """For each alias the version that all of them name, else the one before; an alias that none of them names is gone."""
    found: dict[tuple[str, str], int] = {}
    for key in {key for one in said for key in one}:
        versions = {one.get(key) for one in said}
        version = versions.pop() if len(versions) == 1 else before.get(key)
        if version is not None:
            found[key] = version
    return found

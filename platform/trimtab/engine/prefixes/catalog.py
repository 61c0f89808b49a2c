"""Catalog of an online engine's prefixes or detectors, by name, alias and version.

Requests never wait for the registry. A background task reads it and loads the versions that have aliases. Only then do the
aliases resolve to these versions. If the registry cannot be read, the aliases stay unchanged.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from trimtab.errors import ArtifactError, NotFoundError, TrimtabError

DEFAULT = "champion"
# Time until a refused version is loaded again: versions are immutable, but damaged files can be repaired.
RETRY_SECONDS = 30.0
# Time without a request after which a version without an alias is removed from memory.
IDLE_SECONDS = 600.0
# Version numbers. Longer digit strings are aliases.
NUMBER = re.compile(r"[0-9]{1,9}")

ArtifactT = TypeVar("ArtifactT")
ArtifactT_co = TypeVar("ArtifactT_co", covariant=True)
AliasVersions = Mapping[tuple[str, str], int]
"""Version numbers by (name, alias)."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry.

    Attributes:
        name: name of the prefix or detector.
        version: version number.
        run_id: id of the MLflow run that trained it; None if unknown.
        aliases: aliases that refer to it.
    """

    name: str
    version: int
    run_id: str | None
    aliases: tuple[str, ...] = ()


class ArtifactSource(Protocol[ArtifactT_co]):
    """Source of the artifacts of one kind. Its methods block, and are called in a thread."""

    @property
    def is_cached(self) -> bool:
        """Whether the versions come from a local copy, because the registry has not answered yet."""
        ...

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Return all versions for the base model."""
        ...

    def load(self, known: RegisteredVersion) -> ArtifactT_co:
        """Load the artifact of a version.

        Raises:
            ArtifactError: if the artifact is damaged or must not be used.
        """
        ...


@dataclass(frozen=True)
class VersionNames:
    """Versions that an engine can serve, by kind (`prefix` or `detector`).

    Attributes:
        aliases: version numbers by (name, alias).
        refused: reasons why versions with an alias cannot be used, by NAME@VERSION.
    """

    aliases: Mapping[str, AliasVersions]
    refused: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class LoadedVersion(Generic[ArtifactT]):
    """A version and its artifact (a prefix or detector) in memory."""

    version: RegisteredVersion
    artifact: ArtifactT


@dataclass
class VersionCatalog(Generic[ArtifactT]):
    """Names, aliases and loaded versions of the artifacts of one kind.

    Attributes:
        base: name of the base model.
        kind: `prefix` or `detector`, for messages.
        source: source of the artifacts.
        check: raises ArtifactError for an artifact that this engine cannot use.
        refused: reasons why versions with an alias cannot be used, by NAME@VERSION.
    """

    base: str
    kind: str
    source: ArtifactSource[ArtifactT]
    check: Callable[[ArtifactT], None]
    refused: dict[str, str] = field(default_factory=dict[str, str])
    _aliases: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    _registered: dict[tuple[str, int], RegisteredVersion] = field(default_factory=dict[tuple[str, int], RegisteredVersion])
    _loaded: dict[tuple[str, int], LoadedVersion[ArtifactT]] = field(
        default_factory=dict[tuple[str, int], LoadedVersion[ArtifactT]]
    )
    _retry_at: dict[str, float] = field(default_factory=dict[str, float])
    _used_at: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float])

    async def refresh(self) -> AliasVersions:
        """Read the registry and load every version with an alias.

        Aliases keep resolving to their current versions until `set_aliases` is called.

        Returns:
            Version numbers by (name, alias) for `set_aliases`. The alias of a version that cannot be used keeps its current
            version, and the reason is added to `refused`.

        Raises:
            TrackingError: if the list of versions cannot be read. The catalog is unchanged.
        """
        versions = await asyncio.to_thread(self.source.list_versions)
        aliases: dict[tuple[str, str], int] = {}
        refused: dict[str, str] = {}
        self._registered = {(v.name, v.version): v for v in versions}
        for v in versions:
            for alias in v.aliases:
                label = f"{v.name}@{v.version}"
                try:
                    await self._try_load(v, label)
                    aliases[v.name, alias] = v.version
                except TrimtabError as error:
                    refused[label] = str(error)
                    if (current := self._aliases.get((v.name, alias))) is not None:
                        aliases[v.name, alias] = current
        self.refused = refused
        return aliases

    async def set_aliases(self, aliases: AliasVersions) -> None:
        """Set the version of each alias. If a version cannot be loaded, its alias keeps the current version.

        Args:
            aliases: version numbers by (name, alias). Other aliases are removed.
        """
        updated: dict[tuple[str, str], int] = {}
        for (name, alias), version in aliases.items():
            with suppress(TrimtabError):
                await self.find(name, str(version))
                updated[name, alias] = version
                continue
            if (current := self._aliases.get((name, alias))) is not None:
                updated[name, alias] = current
        self._aliases = updated

    async def find(self, name: str, ref: str | None) -> LoadedVersion[ArtifactT]:
        """Return a version by name and reference, and load it if necessary.

        Args:
            name: name of the prefix or detector.
            ref: alias or version number; None for `champion`.

        Raises:
            NotFoundError: if there is no such version. The message lists the available ones.
            ArtifactError: if the version cannot be used.
        """
        ref = ref or DEFAULT
        number = int(ref) if NUMBER.fullmatch(ref) else self._aliases.get((name, ref))
        if number is None:
            raise NotFoundError(self._build_missing_error(name, ref))
        self._used_at[name, number] = time.monotonic()
        if loaded := self._loaded.get((name, number)):
            return loaded
        if (version := self._registered.get((name, number))) is None:
            raise NotFoundError(self._build_missing_error(name, ref))
        return await self._load(version)

    def evict_unused(self) -> list[RegisteredVersion]:
        """Remove the versions from memory that no alias refers to and that had no request for `IDLE_SECONDS`.

        A later request loads such a version again.

        Returns:
            The removed versions.
        """
        referenced = {(name, version) for (name, _), version in self._aliases.items()}
        oldest = time.monotonic() - IDLE_SECONDS
        idle = [key for key in self._loaded.keys() - referenced if self._used_at.get(key, 0.0) < oldest]
        self._used_at = {key: used for key, used in self._used_at.items() if key in self._loaded and key not in idle}
        return [self._loaded.pop(key).version for key in idle]

    @property
    def aliases(self) -> AliasVersions:
        """Version numbers that the aliases resolve to, by (name, alias)."""
        return self._aliases

    def list_aliases(self) -> Mapping[str, Mapping[str, int]]:
        """Return all names with their aliases and version numbers."""
        names: dict[str, dict[str, int]] = {name: {} for name, _ in self._registered}
        for (name, alias), version in self._aliases.items():
            names.setdefault(name, {})[alias] = version
        return names

    def list_champions(self) -> list[LoadedVersion[ArtifactT]]:
        """Return the champion of each name that has one."""
        keys = [(name, version) for (name, alias), version in self._aliases.items() if alias == DEFAULT]
        return [self._loaded[key] for key in keys]

    async def _try_load(self, version: RegisteredVersion, label: str) -> None:
        """Load a version, or raise its previous error as ArtifactError again within `RETRY_SECONDS`."""
        if (reason := self.refused.get(label)) and time.monotonic() < self._retry_at.get(label, 0.0):
            raise ArtifactError(reason)
        try:
            await self._load(version)
        except TrimtabError:
            self._retry_at[label] = time.monotonic() + RETRY_SECONDS
            raise

    async def _load(self, version: RegisteredVersion) -> LoadedVersion[ArtifactT]:
        key = (version.name, version.version)
        if key not in self._loaded:
            artifact = await asyncio.to_thread(self.source.load, version)
            self.check(artifact)
            self._loaded[key] = LoadedVersion(version, artifact)
        return self._loaded[key]

    def _build_missing_error(self, name: str, ref: str) -> str:
        names = self.list_aliases()
        if name not in names:
            available = ", ".join(f"{self.base}:{n}" for n in sorted(names)) or "none yet"
            return f"no {self.kind} {name!r} for {self.base}; there are: {available}"
        versions = sorted(version for n, version in self._registered if n == name)
        refs = [*(f"@{alias}" for alias in sorted(names[name])), *(f"@{v}" for v in versions)]
        reason = self.refused.get(f"{name}@{ref}")
        return f"{self.kind} {name!r} has no {ref!r}; it has {', '.join(refs)}{f' (refused: {reason})' if reason else ''}"

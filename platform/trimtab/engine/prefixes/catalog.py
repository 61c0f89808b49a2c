"""Catalog of an online engine's prefixes or detectors, by name, alias and version.

Requests never wait for the registry. A background task reads it and loads the versions that have aliases. Only then do the
aliases resolve to these versions. If the registry cannot be read, the aliases stay unchanged.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

from trimtab.engine.prefixes.version_loader import (
    ArtifactSource,
    ArtifactT,
    LoadedVersion,
    RegisteredVersion,
    VersionKey,
    VersionLoader,
)
from trimtab.errors import NotFoundError, TrimtabError

DEFAULT = "champion"
# Version numbers. Longer digit strings are aliases.
NUMBER = re.compile(r"[0-9]{1,9}")

AliasVersions = Mapping[tuple[str, str], int]
"""Version numbers by (name, alias)."""


@dataclass(frozen=True)
class VersionNames:
    """Versions that an engine can serve, by kind (`prefix` or `detector`).

    Attributes:
        aliases: version numbers by (name, alias).
        refused: reasons why versions with an alias cannot be used, by NAME@VERSION.
    """

    aliases: Mapping[str, AliasVersions]
    refused: Mapping[str, Mapping[str, str]]


class VersionCatalog(Generic[ArtifactT]):
    """Names, aliases and loaded versions of the artifacts of one kind.

    Args:
        base: name of the base model.
        kind: `prefix` or `detector`, for messages.
        source: source of the artifacts.
        check: raises ArtifactError for an artifact that this engine cannot use.

    Attributes:
        source: source of the artifacts.
        refused: reasons why versions with an alias cannot be used, by NAME@VERSION.
    """

    def __init__(self, base: str, kind: str, source: ArtifactSource[ArtifactT], check: Callable[[ArtifactT], None]) -> None:
        self.source = source
        self.refused: dict[str, str] = {}
        self._base = base
        self._kind = kind
        self._loader = VersionLoader(source, check)
        self._aliases: AliasVersions = {}
        self._registered: dict[VersionKey, RegisteredVersion] = {}
        self._listed: Sequence[RegisteredVersion] = ()
        self._available: AliasVersions = {}

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
        # Checking a thousand versions takes as long as generating a token.
        if versions == self._listed and not self.refused:
            return self._available
        aliases: dict[tuple[str, str], int] = {}
        refused: dict[str, str] = {}
        self._registered = {v.key: v for v in versions}
        self._pin_referenced()
        for v in versions:
            for alias in v.aliases:
                label = f"{v.name}@{v.version}"
                try:
                    await self._loader.load(v)
                    aliases[v.name, alias] = v.version
                except TrimtabError as error:
                    refused[label] = str(error)
                    if (current := self._aliases.get((v.name, alias))) is not None:
                        aliases[v.name, alias] = current
        self.refused = refused
        self._listed, self._available = versions, aliases
        return aliases

    async def set_aliases(self, aliases: AliasVersions) -> None:
        """Set the version of each alias. If a version cannot be loaded, its alias keeps the current version.

        Args:
            aliases: version numbers by (name, alias). Other aliases are removed.
        """
        if aliases == self._aliases:
            return
        updated: dict[tuple[str, str], int] = {}
        for (name, alias), version in aliases.items():
            with suppress(TrimtabError):
                await self.find(name, str(version))
                updated[name, alias] = version
                continue
            if (current := self._aliases.get((name, alias))) is not None:
                updated[name, alias] = current
        self._aliases = updated
        self._pin_referenced()

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
        if loaded := self._loader.get_loaded((name, number)):
            return loaded
        if (version := self._registered.get((name, number))) is None:
            raise NotFoundError(self._build_missing_error(name, ref))
        return await self._loader.load(version)

    def evict_unused(self) -> list[RegisteredVersion]:
        """Remove versions from memory that no alias refers to and that had no request for some time.

        A later request loads such a version again.

        Returns:
            The versions that were removed since the last call.
        """
        return self._loader.evict_unused()

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
        return [loaded for key in keys if (loaded := self._loader.get_loaded(key))]

    def list_aliased(self) -> list[LoadedVersion[ArtifactT]]:
        """Return the versions that an alias refers to."""
        keys = {(name, version) for (name, _), version in self._aliases.items()}
        return [loaded for key in sorted(keys) if (loaded := self._loader.get_loaded(key))]

    def _pin_referenced(self) -> None:
        """Keep in memory what an alias refers to, in the registry or here."""
        registered = {key for key, version in self._registered.items() if version.aliases}
        self._loader.pin(registered | {(name, version) for (name, _), version in self._aliases.items()})

    def _build_missing_error(self, name: str, ref: str) -> str:
        names = self.list_aliases()
        if name not in names:
            available = ", ".join(f"{self._base}:{n}" for n in sorted(names)) or "none yet"
            return f"no {self._kind} {name!r} for {self._base}; there are: {available}"
        versions = sorted(version for n, version in self._registered if n == name)
        refs = [*(f"@{alias}" for alias in sorted(names[name])), *(f"@{v}" for v in versions)]
        reason = self.refused.get(f"{name}@{ref}")
        return f"{self._kind} {name!r} has no {ref!r}; it has {', '.join(refs)}{f' (refused: {reason})' if reason else ''}"

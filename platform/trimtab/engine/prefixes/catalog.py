"""Which prefixes or detectors an online engine has: names, aliases and versions, kept up to date while it serves.

Requests never wait for the registry. It is read in the background, what it names is loaded, and only then do names point
at it; where it cannot be read, the names stay as they were.
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
# A version, and not a name of as many digits as somebody likes.
# A version that was refused is read again after so long: versions do not change, but damaged files are mended.
RETRY_SECONDS = 30.0
NUMBER = re.compile(r"[0-9]{1,9}")

ArtifactT = TypeVar("ArtifactT")
ArtifactT_co = TypeVar("ArtifactT_co", covariant=True)
AliasVersions = Mapping[tuple[str, str], int]
"""Versions by name and alias."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version that the registry holds."""

    name: str
    version: int
    run_id: str | None
    aliases: tuple[str, ...] = ()


class ArtifactSource(Protocol[ArtifactT_co]):
    """Where parts of one kind come from; called in a thread."""

    @property
    def is_cached(self) -> bool:
        """Whether what it gives is only what was kept of an earlier look."""
        ...

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Every version for this base model."""
        ...

    def load(self, known: RegisteredVersion) -> ArtifactT_co:
        """The part of a version. Raises ArtifactError for one that must not be used."""
        ...


@dataclass(frozen=True)
class VersionNames:
    """What an engine can answer with, by kind: versions by name and alias, and why others with an alias are refused."""

    aliases: Mapping[str, AliasVersions]
    refused: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class LoadedVersion(Generic[ArtifactT]):
    """A version with its part, a prefix or a detector, in memory."""

    version: RegisteredVersion
    artifact: ArtifactT


@dataclass
class VersionCatalog(Generic[ArtifactT]):
    """Names to versions to parts, for the base model called `base`. `check` raises ArtifactError for a part that this engine
    cannot use; `kind` is what people call the parts."""

    base: str
    kind: str
    source: ArtifactSource[ArtifactT]
    check: Callable[[ArtifactT], None]
    refused: dict[str, str] = field(default_factory=dict[str, str])
    _aliases: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    _known: dict[tuple[str, int], RegisteredVersion] = field(default_factory=dict[tuple[str, int], RegisteredVersion])
    _loaded: dict[tuple[str, int], LoadedVersion[ArtifactT]] = field(
        default_factory=dict[tuple[str, int], LoadedVersion[ArtifactT]]
    )
    _again: dict[str, float] = field(default_factory=dict[str, float])

    async def refresh(self) -> AliasVersions:
        """Read the registry and load every version that an alias names; names answer as before until `point` moves them.

        Raises TrackingError where the registry does not answer; nothing changes then. A version that cannot be used is
        refused, with the reason in `refused`, and its alias is given as it is now.
        """
        known = await asyncio.to_thread(self.source.list_versions)
        aliases: dict[tuple[str, str], int] = {}
        refused: dict[str, str] = {}
        self._known = {(k.name, k.version): k for k in known}
        for k in known:
            for alias in k.aliases:
                label = f"{k.name}@{k.version}"
                try:
                    await self._try_load(k, label)
                    aliases[k.name, alias] = k.version
                except ArtifactError as error:
                    refused[label] = str(error)
                    if (old := self._aliases.get((k.name, alias))) is not None:
                        aliases[k.name, alias] = old
        self.refused = refused
        return aliases

    async def set_aliases(self, aliases: AliasVersions) -> None:
        """Let names answer with these versions. One that cannot be had here leaves its alias as it is."""
        pointed: dict[tuple[str, str], int] = {}
        for (name, alias), version in aliases.items():
            with suppress(TrimtabError):
                await self.find(name, str(version))
                pointed[name, alias] = version
                continue
            if (old := self._aliases.get((name, alias))) is not None:
                pointed[name, alias] = old
        self._aliases = pointed

    async def find(self, name: str, ref: str | None) -> LoadedVersion[ArtifactT]:
        """The version that `ref` (alias or number; `champion` if none) names; NotFoundError with what there is."""
        wanted = ref or DEFAULT
        version = int(wanted) if NUMBER.fullmatch(wanted) else self._aliases.get((name, wanted))
        if version is None:
            raise NotFoundError(self._build_missing_error(name, wanted))
        if loaded := self._loaded.get((name, version)):
            return loaded
        if (known := self._known.get((name, version))) is None:
            raise NotFoundError(self._build_missing_error(name, wanted))
        return await self._load(known)

    @property
    def aliases(self) -> AliasVersions:
        """The version that each name and alias answers with now."""
        return self._aliases

    def list_aliases(self) -> Mapping[str, Mapping[str, int]]:
        """Every name that can be asked for, with its aliases and their versions."""
        names: dict[str, dict[str, int]] = {name: {} for name, _ in self._known}
        for (name, alias), version in self._aliases.items():
            names.setdefault(name, {})[alias] = version
        return names

    def list_champions(self) -> list[LoadedVersion[ArtifactT]]:
        """What names without an alias or version answer with."""
        wanted = [(name, version) for (name, alias), version in self._aliases.items() if alias == DEFAULT]
        return [self._loaded[key] for key in wanted]

    async def _try_load(self, known: RegisteredVersion, label: str) -> None:
        """Load a version; one that was refused is refused as before, for a while. Raises ArtifactError."""
        if (why := self.refused.get(label)) and time.monotonic() < self._again[label]:
            raise ArtifactError(why)
        self._again[label] = time.monotonic() + RETRY_SECONDS
        await self._load(known)

    async def _load(self, known: RegisteredVersion) -> LoadedVersion[ArtifactT]:
        key = (known.name, known.version)
        if key not in self._loaded:
            part = await asyncio.to_thread(self.source.load, known)
            self.check(part)
            self._loaded[key] = LoadedVersion(known, part)
        return self._loaded[key]

    def _build_missing_error(self, name: str, ref: str) -> str:
        names = self.list_aliases()
        if name not in names:
            there = ", ".join(f"{self.base}:{n}" for n in sorted(names)) or "none yet"
            return f"no {self.kind} {name!r} for {self.base}; there are: {there}"
        versions = sorted(version for n, version in self._known if n == name)
        has = [*(f"@{alias}" for alias in sorted(names[name])), *(f"@{v}" for v in versions)]
        why = self.refused.get(f"{name}@{ref}")
        return f"{self.kind} {name!r} has no {ref!r}; it has {', '.join(has)}{f' (refused: {why})' if why else ''}"

"""Where a server's prefixes and detectors come from: the MLflow registry, or a folder in its place."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from trimtab import settings
from trimtab.artifacts.card import read_json_object
from trimtab.artifacts.prefix import Prefix, load_prefix
from trimtab.detection.detector import Detector, load_detector
from trimtab.engine.prefixes.catalog import NUMBER, AliasVersions, ArtifactSource, RegisteredVersion
from trimtab.errors import ArtifactError, NotFoundError, TrackingError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.util.atomic_files import write_atomic

log = logging.getLogger(__name__)

ALIASES = "aliases.json"
CARD = "card.json"
# The share of the time that may go into reading a registry of many versions, where nothing in it is known to have changed.
READING = 0.05
UNREAD = -1

ArtifactT = TypeVar("ArtifactT")
ReadCard = dict[int, dict[str, Any]]
"""Cards by version."""


@dataclass
class RegistryView:
    """The versions of a base model in MLflow's registry: read again where trimtab changed something there, and now and then,
    for aliases that others moved. Until it answers for the first time, what this machine last read of it."""

    base: BaseModel
    _versions: Sequence[Version] = ()
    _changed: int = UNREAD
    _next: float = 0.0

    def list_versions(self, kind: str) -> list[Version]:
        """Every version of a kind, with the aliases that point at it."""
        try:
            self._refresh()
        except TrackingError as error:
            if not self.is_cached:
                raise
            self._write_cache(error)
        return [version for version in self._versions if version.kind == kind]

    @property
    def is_cached(self) -> bool:
        """Whether it has not answered yet."""
        return self._changed == UNREAD

    def find_version(self, kind: str, name: str, number: int) -> Version:
        """A version that was read. Raises NotFoundError for others."""
        for version in self._versions:
            if (version.kind, version.name, version.version) == (kind, name, number):
                return version
        raise NotFoundError(f"{self.base.name} has no {kind} {name!r} of version {number}")

    def _refresh(self) -> None:
        changed, began = registry.get_last_modified(self.base.name), time.monotonic()
        if changed != self._changed or began >= self._next:
            self._versions = registry.list_versions(self.base.name)
            ended = time.monotonic()
            self._changed, self._next = changed, ended + (ended - began) / READING
            kept = {"store": settings.get_shown_uri(), "versions": [asdict(version) for version in self._versions]}
            # A full disk costs no more than a start in an outage.
            with suppress(OSError):
                self._read_cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._read_cache, json.dumps(kept))

    def _write_cache(self, error: TrackingError) -> None:
        """Take what was kept; raise the error where that is nothing, or of another store."""
        if self._versions:
            return
        kept = read_json_object(self._read_cache, "a list of versions") if self._read_cache.exists() else {}
        if kept.get("store") != settings.get_shown_uri():
            raise error
        self._versions = [_version(each) for each in kept["versions"]]
        log.warning("%s; until it answers, what was last read of it is used", error)

    @property
    def _read_cache(self) -> Path:
        return settings.get_home() / "registry" / f"{self.base.fingerprint}.json"


@dataclass(frozen=True)
class RegistrySource(Generic[ArtifactT]):
    """Parts of one kind in the MLflow registry; `fetch` reads and checks one."""

    registry: RegistryView
    kind: str
    fetch: Callable[[Version, BaseModel], ArtifactT]

    @property
    def is_cached(self) -> bool:
        """Whether the registry has not answered yet."""
        return self.registry.is_cached

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Every version, with the aliases that point at it."""
        return [RegisteredVersion(v.name, v.version, v.run_id, v.aliases) for v in self.registry.list_versions(self.kind)]

    def load(self, known: RegisteredVersion) -> ArtifactT:
        """The checked part of a version."""
        return self.fetch(self.registry.find_version(self.kind, known.name, known.version), self.registry.base)


@dataclass(frozen=True)
class FolderSource(Generic[ArtifactT]):
    """Parts of one kind in a folder: NAME/VERSION/ holds one as `trimtab` saves it, NAME/aliases.json says which version each
    alias names, as {"champion": 2}. `fetch` reads and checks one."""

    folder: Path
    base: BaseModel
    kind: str
    fetch: Callable[[Path, BaseModel], ArtifactT]
    is_cached: bool = False
    _held: dict[str, tuple[int, ReadCard]] = field(default_factory=dict[str, tuple[int, ReadCard]])
    _read: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict[str, tuple[int, dict[str, Any]]])

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Every version of this kind, with the aliases that point at it."""
        found: list[RegisteredVersion] = []
        for name in sorted(_listed(str(self.folder))):
            mine = self._list_folders(f"{self.folder}/{name}")
            aliases = self._read_object(f"{self.folder}/{name}/{ALIASES}", "a list of aliases") if mine else {}
            for number, card in mine.items():
                pointing = tuple(sorted(alias for alias, version in aliases.items() if version == number))
                found.append(RegisteredVersion(name, number, card.get("run_id"), pointing))
        return found

    def load(self, known: RegisteredVersion) -> ArtifactT:
        """The checked part of a version."""
        return self.fetch(self.folder / known.name / str(known.version), self.base)

    def _list_folders(self, folder: str) -> ReadCard:
        """The cards of this kind in a name's folder, listed again only where something came or went in it: of a thousand names,
        looking at each version's card every second would cost a tenth of a core."""
        changed = _written(folder)
        if changed is None or (held := self._held.get(folder)) is None or held[0] != changed:
            numbers = sorted(int(each) for each in _listed(folder) if NUMBER.fullmatch(each))
            cards = {number: self._read_object(f"{folder}/{number}/{CARD}", "a card") for number in numbers}
            mine = {number: card for number, card in cards.items() if self._check_kind(card)}
            # What is still being written is looked at until it is there.
            held = self._held[folder] = (changed if changed and all(cards.values()) else UNREAD, mine)
        return held[1]

    def _check_kind(self, card: dict[str, Any]) -> bool:
        return (card.get("kind"), card.get("base")) == (self.kind, self.base.name)

    def _read_object(self, path: str, what: str) -> dict[str, Any]:
        """What a file holds, read again only where it was written again; nothing where there is none, and what it held before
        where it is damaged now."""
        if (written := _written(path)) is None:
            return {}
        if (held := self._read.get(path)) is None or held[0] != written:
            try:
                found = read_json_object(Path(path), what)
            except ArtifactError as error:
                log.warning("%s; what it held before stays", error)
                found = held[1] if held else {}
            held = self._read[path] = (written, found)
        return held[1]


def _version(kept: dict[str, Any]) -> Version:
    """A version as `asdict` gave it to JSON."""
    values: dict[str, Any] = kept | {"aliases": tuple(kept["aliases"])}
    return Version(**values)


def _written(path: str) -> int | None:
    """When a file or folder was last written, in nanoseconds; None where there is none."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - paths of pathlib would take as long again
    except OSError:
        return None


def _listed(folder: str) -> list[str]:
    """What a folder holds; nothing where it is none."""
    try:
        with os.scandir(folder) as found:
            return [each.name for each in found]
    except OSError:
        return []


def open_sources(base: BaseModel, folder: str | None) -> tuple[ArtifactSource[Prefix], ArtifactSource[Detector]]:
    """Sources of prefixes and of detectors. Raises UsageError for a folder that is not there."""
    if folder is None:
        held = RegistryView(base)
        return RegistrySource(held, "prefix", registry.load_prefix), RegistrySource(held, "detector", registry.load_detector)
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"registry {folder} is no folder")
    return FolderSource(path, base, "prefix", load_prefix), FolderSource(path, base, "detector", load_detector)


def find_detector_layers(source: ArtifactSource[Detector], live: AliasVersions) -> tuple[int, ...]:
    """Layers that detectors with an alias read, and those that other replicas answer with; what cannot be used wants none."""
    found: set[int] = set()
    answering = {(name, version) for (name, _), version in live.items()}
    for known in source.list_versions():
        if known.aliases or (known.name, known.version) in answering:
            with suppress(ArtifactError):
                found |= set(source.load(known).card.layers)
    return tuple(sorted(found))

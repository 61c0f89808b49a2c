"""Artifact sources of a server: the MLflow registry, or a folder that replaces it."""

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
from trimtab.artifacts.prefix import Prefix, load_prefix
from trimtab.detection.detector import Detector, load_detector
from trimtab.engine.prefixes.catalog import NUMBER, AliasVersions
from trimtab.engine.prefixes.version_loader import ArtifactSource, RegisteredVersion
from trimtab.errors import ArtifactError, NotFoundError, TrackingError, TrimtabError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.client import read_store_stamp
from trimtab.tracking.registry import Version
from trimtab.util.atomic_files import write_atomic
from trimtab.util.json_files import read_json_object

log = logging.getLogger(__name__)

ALIASES, ALIAS_FILE = "aliases.json", "a list of aliases"
CARD = "card.json"
# Maximum share of the time spent on reading a large registry while no change is known.
READING = 0.05
UNREAD = -1

ArtifactT = TypeVar("ArtifactT")
ReadCard = dict[int, dict[str, Any]]
"""Cards by version."""


@dataclass
class RegistryView:
    """Versions of a base model in the MLflow registry.

    The registry is read again after a change by trimtab, and periodically to detect aliases that other tools moved. A local
    store is read after a change of its files only. Until the registry answers for the first time, the versions come from a
    cache on this machine.

    Attributes:
        base: base model.
    """

    base: BaseModel
    _versions: Sequence[Version] = ()
    _changed: int = UNREAD
    _next: float = 0.0
    _stamp: tuple[tuple[int, int], ...] | None = None

    def list_versions(self, kind: str) -> list[Version]:
        """Return all versions of a kind with their aliases.

        Raises:
            TrackingError: if the registry is not available and this machine has no cached versions.
        """
        try:
            self._refresh()
        except TrackingError as error:
            if not self.is_cached:
                raise
            self._load_cache(error)
        return [version for version in self._versions if version.kind == kind]

    @property
    def is_cached(self) -> bool:
        """Whether the registry has not answered yet."""
        return self._changed == UNREAD

    def find_version(self, kind: str, name: str, number: int) -> Version:
        """Return a version of the last read.

        Raises:
            NotFoundError: if there is no such version.
        """
        for version in self._versions:
            if (version.kind, version.name, version.version) == (kind, name, number):
                return version
        raise NotFoundError(f"{self.base.name} has no {kind} {name!r} of version {number}")

    def _refresh(self) -> None:
        # Reading the times of the files of a local store costs a hundredth of a query.
        stamp = read_store_stamp()
        if stamp is not None and stamp == self._stamp:
            return
        changed, began = registry.get_last_modified(self.base.name), time.monotonic()
        if changed != self._changed or began >= self._next:
            self._versions = registry.list_versions(self.base.name)
            ended = time.monotonic()
            self._changed, self._next, self._stamp = changed, ended + (ended - began) / READING, stamp
            cached = {"store": settings.get_shown_uri(), "versions": [asdict(version) for version in self._versions]}
            # The cache is optional: it only allows a start while the registry is down.
            with suppress(OSError):
                self._cache_path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._cache_path, json.dumps(cached))

    def _load_cache(self, error: TrackingError) -> None:
        """Read the cached versions; raise the error if there are none, or they are from another store."""
        if self._versions:
            return
        cached = read_json_object(self._cache_path, "a list of versions") if self._cache_path.exists() else {}
        if cached.get("store") != settings.get_shown_uri():
            raise error
        self._versions = [_parse_version(entry) for entry in cached["versions"]]
        log.warning("%s; using the cached list of versions until the registry answers", error)

    @property
    def _cache_path(self) -> Path:
        return settings.get_home() / "registry" / f"{self.base.fingerprint}.json"


@dataclass(frozen=True)
class RegistrySource(Generic[ArtifactT]):
    """Artifacts of one kind in the MLflow registry.

    Attributes:
        registry: versions of the base model.
        kind: "prefix" or "detector".
        fetch: function that loads and checks the artifact of a version.
    """

    registry: RegistryView
    kind: str
    fetch: Callable[[Version, BaseModel], ArtifactT]

    @property
    def is_cached(self) -> bool:
        """Whether the registry has not answered yet."""
        return self.registry.is_cached

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Return all versions of this kind with their aliases.

        Raises:
            TrackingError: if the registry is not available and this machine has no cached versions.
        """
        return [RegisteredVersion(v.name, v.version, v.run_id, v.aliases) for v in self.registry.list_versions(self.kind)]

    def load(self, version: RegisteredVersion) -> ArtifactT:
        """Load and check the artifact of a version.

        Raises:
            ArtifactError: if the artifact is damaged or was made for another base model.
        """
        return self.fetch(self.registry.find_version(self.kind, version.name, version.version), self.registry.base)


@dataclass(frozen=True)
class BuiltVersions:
    """Versions of a name, and the files that they were built from.

    Attributes:
        cards: cards by version.
        targets: version numbers by alias.
        versions: versions with their aliases.
    """

    cards: ReadCard
    targets: dict[str, Any]
    versions: list[RegisteredVersion]


@dataclass(frozen=True)
class FolderSource(Generic[ArtifactT]):
    """Artifacts of one kind in a folder.

    NAME/VERSION/ is a saved artifact, and NAME/aliases.json maps aliases to versions, such as {"champion": 2}.

    Attributes:
        folder: root folder.
        base: base model.
        kind: "prefix" or "detector".
        fetch: function that loads and checks the artifact in a folder.
        is_cached: always False, as a folder has no cache.
    """

    folder: Path
    base: BaseModel
    kind: str
    fetch: Callable[[Path, BaseModel], ArtifactT]
    is_cached: bool = False
    _cards: dict[str, tuple[int, ReadCard]] = field(default_factory=dict[str, tuple[int, ReadCard]])
    _objects: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict[str, tuple[int, dict[str, Any]]])
    _versions_by_name: dict[str, BuiltVersions] = field(default_factory=dict[str, BuiltVersions])

    def list_versions(self) -> Sequence[RegisteredVersion]:
        """Return all versions of this kind with their aliases."""
        versions: list[RegisteredVersion] = []
        # A line break in a name would end a header of the response.
        for name in filter(str.isprintable, sorted(_list_names(str(self.folder)))):
            cards = self._read_cards(f"{self.folder}/{name}")
            targets = self._read_object(f"{self.folder}/{name}/{ALIASES}", ALIAS_FILE) if cards else {}
            versions += self._build_versions(name, cards, targets)
        return versions

    def load(self, version: RegisteredVersion) -> ArtifactT:
        """Load and check the artifact of a version.

        Raises:
            ArtifactError: if the artifact is damaged or was made for another base model.
        """
        return self.fetch(self.folder / version.name / str(version.version), self.base)

    def _build_versions(self, name: str, cards: ReadCard, targets: dict[str, Any]) -> list[RegisteredVersion]:
        """Return the versions of a name; the same objects while its files are unchanged, which are fast to compare."""
        cached = self._versions_by_name.get(name)
        if cached is None or cached.cards is not cards or cached.targets != targets:
            versions = [
                RegisteredVersion(name, number, card.get("run_id"), tuple(sorted(a for a, v in targets.items() if v == number)))
                for number, card in cards.items()
            ]
            cached = self._versions_by_name[name] = BuiltVersions(cards, targets, versions)
        return cached.versions

    def _read_cards(self, folder: str) -> ReadCard:
        """Return the cards of this kind in the folder of a name; list it again only if its entries changed.

        With a thousand names, checking the card of every version each second would take a tenth of a CPU core.
        """
        modified = _get_modification_time(folder)
        if modified is None or (cached := self._cards.get(folder)) is None or cached[0] != modified:
            numbers = sorted(int(entry) for entry in _list_names(folder) if NUMBER.fullmatch(entry))
            cards = {number: self._read_object(f"{folder}/{number}/{CARD}", "a card") for number in numbers}
            matching = {number: card for number, card in cards.items() if self._has_kind(card)}
            # A missing card may still be written: list the folder again in the next call.
            cached = self._cards[folder] = (modified if modified and all(cards.values()) else UNREAD, matching)
        return cached[1]

    def _has_kind(self, card: dict[str, Any]) -> bool:
        return (card.get("kind"), card.get("base")) == (self.kind, self.base.name)

    def _read_object(self, path: str, what: str) -> dict[str, Any]:
        """Return the object in a JSON file, read again only if the file was modified.

        A missing file gives an empty object, and a damaged file its last valid content.
        """
        if (modified := _get_modification_time(path)) is None:
            return {}
        if (cached := self._objects.get(path)) is None or cached[0] != modified:
            try:
                content = read_json_object(Path(path), what)
                if what == ALIAS_FILE and not all(type(number) is int for number in content.values()):
                    raise ArtifactError(f"{path}: aliases must refer to version numbers")
            except ArtifactError as error:
                log.warning("%s; keeping its previous content", error)
                content = cached[1] if cached else {}
            cached = self._objects[path] = (modified, content)
        return cached[1]


def _parse_version(entry: dict[str, Any]) -> Version:
    """Build a version from the JSON of its `asdict`."""
    values: dict[str, Any] = entry | {"aliases": tuple(entry["aliases"])}
    return Version(**values)


def _get_modification_time(path: str) -> int | None:
    """Return the modification time of a file or folder (nanoseconds); None if it does not exist."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - pathlib would double the time
    except OSError:
        return None


def _list_names(folder: str) -> list[str]:
    """Return the names of a folder's entries; an empty list if it is not a folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except OSError:
        return []


def open_sources(base: BaseModel, folder: str | None) -> tuple[ArtifactSource[Prefix], ArtifactSource[Detector]]:
    """Return the sources of prefixes and of detectors.

    Args:
        base: base model.
        folder: folder that replaces the MLflow registry, None for the registry.

    Raises:
        UsageError: if the folder does not exist.
    """
    if folder is None:
        view = RegistryView(base)
        return RegistrySource(view, "prefix", registry.load_prefix), RegistrySource(view, "detector", registry.load_detector)
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"registry {folder} is not a folder")
    return FolderSource(path, base, "prefix", load_prefix), FolderSource(path, base, "detector", load_detector)


@dataclass(frozen=True)
class ReadSignals:
    """Signals that detectors read.

    Attributes:
        layers: sorted layers.
        token_statistics: whether one of them reads the statistics of tokens.
    """

    layers: tuple[int, ...] = ()
    token_statistics: bool = False


def find_read_signals(source: ArtifactSource[Detector], live: AliasVersions) -> ReadSignals:
    """Return the signals that the usable detectors read.

    Args:
        source: source of the detectors.
        live: detector versions that other replicas serve.

    Returns:
        Signals of the detectors that have an alias or are live; detectors that cannot be loaded are skipped.
    """
    layers: set[int] = set()
    reads_trace = False
    live_versions = {(name, version) for (name, _), version in live.items()}
    for version in source.list_versions():
        if version.aliases or (version.name, version.version) in live_versions:
            # One version whose files are gone must not keep the server from starting.
            with suppress(TrimtabError):
                detector = source.load(version)
                layers |= set(detector.card.layers)
                reads_trace |= detector.reads_trace
    return ReadSignals(tuple(sorted(layers)), reads_trace)

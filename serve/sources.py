"""Where a server's prefixes and detectors come from: the MLflow registry, or a folder in its place."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from trimtab import detector as detectors
from trimtab import prefix as prefixes
from trimtab.base import BaseModel
from trimtab.card import read_object
from trimtab.detector import Detector
from trimtab.engine.library import NUMBER, Aliases, Known, Source
from trimtab.errors import ArtefactError, UsageError
from trimtab.prefix import Prefix
from trimtab.tracking import registry
from trimtab.tracking.registry import Version

log = logging.getLogger(__name__)

ALIASES = "aliases.json"
CARD = "card.json"
# The share of the time that may go into reading a registry of many versions, where nothing in it is known to have changed.
READING = 0.05

Part = TypeVar("Part")


@dataclass
class Registry:
    """The versions of a base model in MLflow's registry: read again where trimtab changed something there, and now and then,
    for aliases that others moved."""

    base: BaseModel
    _versions: Sequence[Version] = ()
    _changed: int = -1
    _next: float = 0.0

    def versions(self, kind: str) -> list[Version]:
        """Every version of a kind, with the aliases that point at it."""
        changed, began = registry.changed(self.base.name), time.monotonic()
        if changed != self._changed or began >= self._next:
            self._versions = registry.versions(self.base.name)
            ended = time.monotonic()
            self._changed, self._next = changed, ended + (ended - began) / READING
        return [version for version in self._versions if version.kind == kind]


@dataclass(frozen=True)
class FromRegistry(Generic[Part]):
    """Parts of one kind in the MLflow registry; `fetch` reads and checks one."""

    registry: Registry
    kind: str
    fetch: Callable[[Version, BaseModel], Part]

    def known(self) -> Sequence[Known]:
        """Every version, with the aliases that point at it."""
        return [Known(v.name, v.version, v.run_id, v.aliases) for v in self.registry.versions(self.kind)]

    def load(self, known: Known) -> Part:
        """The checked part of a version."""
        base = self.registry.base
        return self.fetch(registry.find(base.name, known.name, str(known.version)), base)


@dataclass(frozen=True)
class FromFolder(Generic[Part]):
    """Parts of one kind in a folder: NAME/VERSION/ holds one as `trimtab` saves it, NAME/aliases.json says which version each
    alias names, as {"champion": 2}. `fetch` reads and checks one."""

    folder: Path
    base: BaseModel
    kind: str
    fetch: Callable[[Path, BaseModel], Part]
    _read: dict[Path, tuple[int, dict[str, Any]]] = field(default_factory=dict[Path, tuple[int, dict[str, Any]]])

    def known(self) -> Sequence[Known]:
        """Every version of this kind, with the aliases that point at it."""
        found: list[Known] = []
        for held in sorted(self.folder.glob(f"*/*/{CARD}")):
            name, number = held.parent.parent.name, held.parent.name
            aliases = self._object(self.folder / name / ALIASES, "a list of aliases")
            card = self._object(held, "a card")
            if (card.get("kind"), card.get("base")) == (self.kind, self.base.name) and NUMBER.fullmatch(number):
                mine = tuple(sorted(alias for alias, version in aliases.items() if version == int(number)))
                found.append(Known(name, int(number), card.get("run_id"), mine))
        return found

    def load(self, known: Known) -> Part:
        """The checked part of a version."""
        return self.fetch(self.folder / known.name / str(known.version), self.base)

    def _object(self, path: Path, what: str) -> dict[str, Any]:
        """What a file holds, read again only where it was written again; nothing where there is none, and what it held before
        where it is damaged now."""
        try:
            written = path.stat().st_mtime_ns
        except OSError:
            return {}
        if (held := self._read.get(path)) is None or held[0] != written:
            try:
                found = read_object(path, what)
            except ArtefactError as error:
                log.warning("%s; what it held before stays", error)
                found = held[1] if held else {}
            held = self._read[path] = (written, found)
        return held[1]


def opened(base: BaseModel, folder: str | None) -> tuple[Source[Prefix], Source[Detector]]:
    """Sources of prefixes and of detectors. Raises UsageError for a folder that is not there."""
    if folder is None:
        held = Registry(base)
        return FromRegistry(held, "prefix", registry.load), FromRegistry(held, "detector", registry.load_detector)
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"registry {folder} is no folder")
    return FromFolder(path, base, "prefix", prefixes.load), FromFolder(path, base, "detector", detectors.load)


def layers(source: Source[Detector], live: Aliases) -> tuple[int, ...]:
    """Layers that detectors with an alias read, and those that other replicas answer with; what cannot be used wants none."""
    found: set[int] = set()
    answering = {(name, version) for (name, _), version in live.items()}
    for known in source.known():
        if known.aliases or (known.name, known.version) in answering:
            with suppress(ArtefactError):
                found |= set(source.load(known).card.layers)
    return tuple(sorted(found))

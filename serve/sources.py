"""Where a server's prefixes and detectors come from: the MLflow registry, or a folder in its place."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from trimtab import detector as detectors
from trimtab import prefix as prefixes
from trimtab.base import BaseModel
from trimtab.card import read_object
from trimtab.detector import Detector
from trimtab.engine.library import Known, Source
from trimtab.errors import ArtefactError, UsageError
from trimtab.prefix import Prefix
from trimtab.tracking import registry
from trimtab.tracking.registry import Version

ALIASES = "aliases.json"
CARD = "card.json"

Part = TypeVar("Part")


@dataclass(frozen=True)
class FromRegistry(Generic[Part]):
    """Parts of one kind for one base model in the MLflow registry; `fetch` reads and checks one."""

    base: BaseModel
    kind: str
    fetch: Callable[[Version, BaseModel], Part]

    def known(self) -> Sequence[Known]:
        """Every version, with the aliases that point at it."""
        return [Known(v.name, v.version, v.run_id, v.aliases) for v in registry.versions(self.base.name, kind=self.kind)]

    def load(self, known: Known) -> Part:
        """The checked part of a version."""
        return self.fetch(registry.find(self.base.name, known.name, str(known.version)), self.base)


@dataclass(frozen=True)
class FromFolder(Generic[Part]):
    """Parts of one kind in a folder: NAME/VERSION/ holds one as `trimtab` saves it, NAME/aliases.json says which version each
    alias names, as {"champion": 2}. `fetch` reads and checks one."""

    folder: Path
    base: BaseModel
    kind: str
    fetch: Callable[[Path, BaseModel], Part]

    def known(self) -> Sequence[Known]:
        """Every version of this kind, with the aliases that point at it."""
        found: list[Known] = []
        for held in sorted(self.folder.glob(f"*/*/{CARD}")):
            name, number = held.parent.parent.name, held.parent.name
            aliases = self._aliases(name)
            try:
                card = read_object(held, "a card")
            except ArtefactError:
                continue
            if (card.get("kind"), card.get("base")) == (self.kind, self.base.name) and number.isdigit():
                mine = tuple(sorted(alias for alias, version in aliases.items() if version == int(number)))
                found.append(Known(name, int(number), card.get("run_id"), mine))
        return found

    def load(self, known: Known) -> Part:
        """The checked part of a version."""
        return self.fetch(self.folder / known.name / str(known.version), self.base)

    def _aliases(self, name: str) -> dict[str, Any]:
        path = self.folder / name / ALIASES
        return read_object(path, "a list of aliases") if path.exists() else {}


def opened(base: BaseModel, folder: str | None) -> tuple[Source[Prefix], Source[Detector]]:
    """Sources of prefixes and of detectors. Raises UsageError for a folder that is not there."""
    if folder is None:
        return FromRegistry(base, "prefix", registry.load), FromRegistry(base, "detector", registry.load_detector)
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"registry {folder} is no folder")
    return FromFolder(path, base, "prefix", prefixes.load), FromFolder(path, base, "detector", detectors.load)


def layers(source: Source[Detector]) -> tuple[int, ...]:
    """Layers that the detectors with an alias read; what cannot be used wants none."""
    found: set[int] = set()
    for known in source.known():
        if known.aliases:
            with suppress(ArtefactError):
                found |= set(source.load(known).card.layers)
    return tuple(sorted(found))

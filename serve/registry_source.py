"""The registry as the online engine sees it: the versions of one base model's prefixes, or of its detectors."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from trimtab.base import BaseModel
from trimtab.detector import Detector
from trimtab.engine.library import Known
from trimtab.errors import ArtefactError
from trimtab.prefix import Prefix
from trimtab.tracking import registry


@dataclass(frozen=True)
class Prefixes:
    """Prefixes of the MLflow registry for one base model."""

    base: BaseModel

    def known(self) -> Sequence[Known]:
        """Every version, with the aliases that point at it."""
        return _known(self.base, "prefix")

    def load(self, known: Known) -> Prefix:
        """The checked prefix of a version."""
        return registry.load(registry.find(self.base.name, known.name, str(known.version)), self.base)


@dataclass(frozen=True)
class Detectors:
    """Detectors of the MLflow registry for one base model."""

    base: BaseModel

    def known(self) -> Sequence[Known]:
        """Every version, with the aliases that point at it."""
        return _known(self.base, "detector")

    def load(self, known: Known) -> Detector:
        """The checked detector of a version."""
        return registry.load_detector(registry.find(self.base.name, known.name, str(known.version)), self.base)

    def layers(self) -> tuple[int, ...]:
        """Layers that the detectors with an alias read; what cannot be used wants none."""
        found: set[int] = set()
        for known in self.known():
            if known.aliases:
                with suppress(ArtefactError):
                    found |= set(self.load(known).card.layers)
        return tuple(sorted(found))


def _known(base: BaseModel, kind: str) -> list[Known]:
    return [Known(v.name, v.version, v.run_id, v.aliases) for v in registry.versions(base.name, kind=kind)]

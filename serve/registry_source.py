"""The registry as the online engine sees it: the versions of one base model's prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.base import BaseModel
from trimtab.engine.library import Known
from trimtab.prefix import Prefix
from trimtab.tracking import registry


@dataclass(frozen=True)
class RegistrySource:
    """Prefixes of the MLflow registry for one base model."""

    base: BaseModel

    def known(self) -> Sequence[Known]:
        """Every version, with the aliases that point at it."""
        return [Known(v.name, v.version, v.run_id, v.aliases) for v in registry.versions(self.base.name, kind="prefix")]

    def load(self, known: Known) -> Prefix:
        """The checked prefix of a version."""
        return registry.load(registry.find(self.base.name, known.name, str(known.version)), self.base)

"""`trimtab.load_prefix` and `trimtab.load_detector`: by folder or by name."""

from pathlib import Path

from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import print_line
from trimtab.detection import detector as detectors
from trimtab.detection.detector import Detector
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version


def find_prefixes(spec: str, base: BaseModel) -> dict[str, Prefix]:
    """Prefixes by name: `champion` is every champion of the base model, if there is one; else a folder, NAME, or
    NAME@alias-or-version."""
    if Path(spec).is_dir():
        prefix = prefixes.load_prefix(Path(spec), base)
        return {prefix.card.name: prefix}
    if spec == registry.CHAMPION:
        found = [v for v in registry.list_versions(base.name, kind="prefix") if registry.CHAMPION in v.aliases]
        if not found:
            print_line(
                f"no prefix of {base.name} is champion yet (--prefix names another): the base model and the text prompt alone"
            )
    else:
        name, _, ref = spec.partition("@")
        found = [registry.find_version(base.name, name, ref or registry.CHAMPION)]
    return {f"{v.name}@{v.version}": registry.load_prefix(v, base) for v in found}


def load_prefix(path_or_name: str | Path, base: str = "smollm2-135m") -> Prefix:
    """A prefix from a folder, or from the registry as NAME (its champion), NAME@alias or NAME@version.

    Raises ArtifactError for a folder that must not be used, NotFoundError for a name that does not exist.
    """
    if Path(path_or_name).is_dir():
        return prefixes.load_prefix(Path(path_or_name))
    return registry.load_prefix(_find_version(path_or_name, base))


def load_detector(path_or_name: str | Path, base: str = "smollm2-135m") -> Detector:
    """A detector from a folder, or from the registry as NAME (its champion), NAME@alias or NAME@version.

    Raises ArtifactError for a folder that must not be used, NotFoundError for a name that does not exist.
    """
    if Path(path_or_name).is_dir():
        return detectors.load_detector(Path(path_or_name))
    return registry.load_detector(_find_version(path_or_name, base))


def _find_version(name: str | Path, base: str) -> Version:
    name, _, ref = str(name).partition("@")
    return registry.find_version(base, name, ref or registry.CHAMPION)

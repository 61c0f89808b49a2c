"""`trimtab.load_prefix` and `trimtab.load_detector`: by folder or by name."""

from pathlib import Path

from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.prefix import Prefix
from trimtab.detection import detector as detectors
from trimtab.detection.detector import Detector
from trimtab.tracking import registry
from trimtab.tracking.registry import Version


def load_prefix(path_or_name: str | Path, base: str = "smollm2-135m") -> Prefix:
    """A prefix from a folder, or from the registry as NAME (its champion), NAME@alias or NAME@version.

    Raises ArtefactError for a folder that must not be used, NotFoundError for a name that does not exist.
    """
    if Path(path_or_name).is_dir():
        return prefixes.load(Path(path_or_name))
    return registry.load(_version(path_or_name, base))


def load_detector(path_or_name: str | Path, base: str = "smollm2-135m") -> Detector:
    """A detector from a folder, or from the registry as NAME (its champion), NAME@alias or NAME@version.

    Raises ArtefactError for a folder that must not be used, NotFoundError for a name that does not exist.
    """
    if Path(path_or_name).is_dir():
        return detectors.load(Path(path_or_name))
    return registry.load_detector(_version(path_or_name, base))


def _version(name: str | Path, base: str) -> Version:
    name, _, ref = str(name).partition("@")
    return registry.find(base, name, ref or registry.CHAMPION)

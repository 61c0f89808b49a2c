"""Loading of prefixes and detectors by folder or registry name."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import print_line
from trimtab.detection import detector as detectors
from trimtab.detection.detector import Detector
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.types import DEFAULT_BASE
from trimtab.util.identifiers import split_reference

ArtifactT = TypeVar("ArtifactT")


def find_prefixes(spec: str, base: BaseModel) -> dict[str, Prefix]:
    """Load prefixes by specification.

    Args:
        spec: folder, NAME, NAME@alias, NAME@version, or `champion` for all champions of the base model.
        base: base model of the prefixes.

    Returns:
        Prefixes by name; empty if `spec` is `champion` and the base model has no champion.
    """
    if Path(spec).is_dir():
        prefix = prefixes.load_prefix(Path(spec), base)
        return {prefix.card.name: prefix}
    if spec == registry.CHAMPION:
        versions = [v for v in registry.list_versions(base.name, kind="prefix") if registry.CHAMPION in v.aliases]
        if not versions:
            print_line(
                f"no champion prefix for {base.name}: only the base model and the text prompt run. Name a prefix with --prefix"
            )
    else:
        versions = [_find_version(spec, base.name)]
    return {f"{v.name}@{v.version}": registry.load_prefix(v, base) for v in versions}


def load_prefix(path_or_name: str | Path, base: str = DEFAULT_BASE) -> Prefix:
    """Load a prefix from a folder or from the registry.

    Args:
        path_or_name: folder, or a registry name: NAME (its champion), NAME@alias or NAME@version.
        base: base model whose registry entries are searched.

    Raises:
        ArtifactError: if the files in the folder are damaged, unsafe or incompatible.
        NotFoundError: if the name does not exist.
    """
    return _load(path_or_name, base, prefixes.load_prefix, registry.load_prefix)


def load_detector(path_or_name: str | Path, base: str = DEFAULT_BASE) -> Detector:
    """Load a detector from a folder or from the registry. Arguments and errors are those of `load_prefix`."""
    return _load(path_or_name, base, detectors.load_detector, registry.load_detector)


def _load(
    path_or_name: str | Path, base: str, read_folder: Callable[[Path], ArtifactT], load_version: Callable[[Version], ArtifactT]
) -> ArtifactT:
    if Path(path_or_name).is_dir():
        return read_folder(Path(path_or_name))
    return load_version(_find_version(path_or_name, base))


def _find_version(name: str | Path, base: str) -> Version:
    name, ref = split_reference(str(name))
    return registry.find_version(base, name, ref or registry.CHAMPION)

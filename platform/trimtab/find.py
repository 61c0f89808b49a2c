"""`trimtab.load_prefix`: a prefix by folder or by name."""

from pathlib import Path

from trimtab import prefix as prefixes
from trimtab.prefix import Prefix
from trimtab.tracking import registry


def load_prefix(path_or_name: str | Path, base: str = "smollm2-135m") -> Prefix:
    """A prefix from a folder, or from the registry as NAME (its champion), NAME@alias or NAME@version.

    Raises ArtefactError for a folder that must not be used, NotFoundError for a name that does not exist.
    """
    if Path(path_or_name).is_dir():
        return prefixes.load(Path(path_or_name))
    name, _, ref = str(path_or_name).partition("@")
    return registry.load(registry.find(base, name, ref or registry.CHAMPION))

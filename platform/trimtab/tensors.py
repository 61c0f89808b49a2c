"""Reading safetensors files that may be anything."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trimtab.errors import ArtefactError

MIB = 1 << 20


def read_tensors(path: Path, what: str, most: int) -> dict[str, Tensor]:
    """All tensors of a file that holds `what`, of at most so many MiB; ArtefactError where it is missing, larger or damaged."""
    if not path.exists():
        raise ArtefactError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > most * MIB:
        raise ArtefactError(f"{path} is larger than {what} may be ({most} MiB)")
    try:
        # Not mapped into memory: where such a file is written anew, reading on would end this process.
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ArtefactError(f"{path} is not a whole safetensors file (truncated, or of another format)") from error

"""Prefix artifact: learned vectors (safetensors) and their card (JSON), validated on every load."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifacts.card import PrefixCard, check_base_model, read_card, read_tensors, write_card
from trimtab.errors import ArtifactError
from trimtab.model.base_model import BaseModel
from trimtab.types import MAX_ROWS

FILE = "prefix.safetensors"
MAX_MIB = 64


@dataclass(frozen=True)
class Prefix:
    """Learned prefix of a base model.

    Attributes:
        vectors: float32 [k, d], in the space of the embedding table's rows (before any scaling that the model applies).
        card: card of the prefix.
    """

    vectors: Tensor
    card: PrefixCard

    @cached_property
    def salt(self) -> str:
        """KV cache salt, a hash of the vectors: prefixes with different vectors share no cached blocks."""
        return self.card.digest[:32]

    @property
    def nbytes(self) -> int:
        """Size of the vectors in bytes."""
        return self.vectors.nbytes


def compute_digest(vectors: Tensor) -> str:
    """Return the SHA-256 of the vectors' float32 bytes, in hex."""
    return hashlib.sha256(vectors.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def build_prefix(vectors: Tensor, card: PrefixCard) -> Prefix:
    """Build a prefix from new vectors.

    Args:
        vectors: learned vectors [k, d]; converted to float32 on the CPU.
        card: card whose `num_virtual_tokens`, `width` and `digest` are replaced by those of the vectors.

    Raises:
        ArtifactError: if the vectors are not finite or k is not between 1 and 64.
    """
    vectors = vectors.detach().cpu().float().contiguous()
    count, width = vectors.shape
    prefix = Prefix(vectors, replace(card, num_virtual_tokens=count, width=width, digest=compute_digest(vectors)))
    _check_prefix(prefix, "new prefix")
    return prefix


def save_prefix(prefix: Prefix, folder: Path) -> Path:
    """Write a prefix to a folder as two files, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": prefix.vectors.contiguous()}, folder / FILE)
    write_card(prefix.card, folder)
    return folder


def load_prefix(folder: Path, base: BaseModel | None = None) -> Prefix:
    """Read a prefix and validate it.

    Args:
        folder: folder of the prefix.
        base: base model that the prefix must match, if given.

    Raises:
        ArtifactError: if a file is missing, truncated, pickled or of another format; if the vectors contain NaN or infinity,
            have more than 64 rows, or do not match the shape or digest of the card; if the width or fingerprint belongs to
            another base model; or if the card version is unknown.
    """
    folder = Path(folder)
    card = read_card(folder)
    path = folder / FILE
    prefix = Prefix(read_single_tensor(path, "vectors"), card)
    _check_prefix(prefix, str(path))
    if base is not None:
        check_base(prefix, base)
    return prefix


def read_single_tensor(path: Path, name: str) -> Tensor:
    """Read the only tensor of a safetensors file.

    Args:
        path: file of at most 64 MiB.
        name: name that the tensor must have.

    Raises:
        ArtifactError: if the file is missing, too large or damaged, or contains other tensors.
    """
    tensors = read_tensors(path, "a prefix", MAX_MIB)
    if set(tensors) != {name}:
        raise ArtifactError(f"{path} must contain one tensor named {name}, not {sorted(tensors)[:5]}")
    return tensors[name]


def check_base(prefix: Prefix, base: BaseModel) -> None:
    """Raise ArtifactError unless the prefix was trained for exactly this base model (width and fingerprint)."""
    check_base_model(prefix.card, base, f"prefix {prefix.card.name!r}", "Train it again on this base model")


def check_tensor(tensor: Tensor, shape: Sequence[int], digest: str, what: str) -> None:
    """Check the tensor of an artifact against its card.

    Args:
        tensor: tensor to check.
        shape: shape on the card.
        digest: digest on the card.
        what: noun in the plural for error messages, such as "file: the vectors".

    Raises:
        ArtifactError: if the tensor is not float32, contains NaN or infinity, or has another shape or digest.
    """
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(shape):
        raise ArtifactError(f"{what} are {tensor.dtype} {list(tensor.shape)}, but the card says torch.float32 {list(shape)}")
    if not torch.isfinite(tensor).all():
        raise ArtifactError(f"{what} contain NaN or infinity")
    if compute_digest(tensor) != digest:
        raise ArtifactError(f"{what} are not those of the card (digest differs)")


def _check_prefix(prefix: Prefix, where: str) -> None:
    vectors, card = prefix.vectors, prefix.card
    if vectors.ndim != 2:
        raise ArtifactError(f"{where}: the vectors must be float32 [k, d], not {vectors.dtype} {list(vectors.shape)}")
    if not 1 <= len(vectors) <= MAX_ROWS:
        raise ArtifactError(f"{where}: {len(vectors)} rows, but a prefix has 1 to {MAX_ROWS}")
    check_tensor(vectors, (card.num_virtual_tokens, card.width), card.digest, f"{where}: the vectors")

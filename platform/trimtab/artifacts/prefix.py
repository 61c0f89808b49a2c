"""A prefix: k learned embedding rows and their card, kept as safetensors + JSON and checked whenever they are read."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifacts.card import PrefixCard, read_card, read_tensors, write_card
from trimtab.errors import ArtifactError
from trimtab.model.base_model import BaseModel
from trimtab.types import MAX_ROWS

FILE = "prefix.safetensors"
MAX_MIB = 64


@dataclass(frozen=True)
class Prefix:
    """`vectors` is float32 [k, d], in the space of the embedding table's rows (before any scaling the model applies)."""

    vectors: Tensor
    card: PrefixCard

    @cached_property
    def salt(self) -> str:
        """Keeps KV cache of different prefixes apart: a hash of the vectors, not of their name."""
        return self.card.digest[:32]


def compute_digest(vectors: Tensor) -> str:
    """SHA-256 of the vectors' float32 bytes, in hex."""
    return hashlib.sha256(vectors.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def build_prefix(vectors: Tensor, card: PrefixCard) -> Prefix:
    """A prefix of new vectors [k, d]: shape and digest are written into the card. Raises ArtifactError as `load` does."""
    vectors = vectors.detach().cpu().float().contiguous()
    rows, width = vectors.shape
    prefix = Prefix(vectors, replace(card, rows=rows, width=width, digest=compute_digest(vectors)))
    _check_prefix(prefix, "new prefix")
    return prefix


def save_prefix(prefix: Prefix, folder: Path) -> Path:
    """Write a prefix as a folder of two files; gives the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": prefix.vectors.contiguous()}, folder / FILE)
    write_card(prefix.card, folder)
    return folder


def load_prefix(folder: Path, base: BaseModel | None = None) -> Prefix:
    """Read a prefix and check it, against a base model where one is given.

    Raises ArtifactError: truncated, pickled or foreign file; NaN or infinity; a shape or digest that is not the card's; more
    than 64 rows; another base model's width or fingerprint; an unknown card version.
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
    """The only tensor of a safetensors file; ArtifactError for a file that is missing, too large, damaged, or holds another."""
    found = read_tensors(path, "a prefix", MAX_MIB)
    if set(found) != {name}:
        raise ArtifactError(f"{path} must hold one tensor named {name}, not {sorted(found)[:5]}")
    return found[name]


def check_base(prefix: Prefix, base: BaseModel) -> None:
    """ArtifactError unless the prefix was made for exactly this base model."""
    card = prefix.card
    if card.width != base.width:
        raise ArtifactError(f"prefix {card.name!r} has width {card.width}; base model {base.name} has {base.width}")
    if card.fingerprint != base.fingerprint:
        raise ArtifactError(
            f"prefix {card.name!r} was made for base model {card.base} ({card.fingerprint}), not for {base.name} "
            f"({base.fingerprint}): train it again on this one"
        )


def _check_prefix(prefix: Prefix, where: str) -> None:
    vectors, card = prefix.vectors, prefix.card
    if vectors.ndim != 2 or vectors.dtype != torch.float32:
        raise ArtifactError(f"{where}: vectors must be float32 [k, d], not {vectors.dtype} {list(vectors.shape)}")
    if not 1 <= vectors.shape[0] <= MAX_ROWS:
        raise ArtifactError(f"{where}: {vectors.shape[0]} rows; a prefix has 1 to {MAX_ROWS}")
    if tuple(vectors.shape) != (card.rows, card.width):
        raise ArtifactError(f"{where}: vectors are {list(vectors.shape)}, the card says {[card.rows, card.width]}")
    if not torch.isfinite(vectors).all():
        raise ArtifactError(f"{where}: the vectors hold NaN or infinity")
    if compute_digest(vectors) != card.digest:
        raise ArtifactError(f"{where}: the vectors are not those of the card (digest differs)")

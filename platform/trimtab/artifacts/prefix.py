"""A prefix: k learned embedding rows and their card, kept as safetensors + JSON and checked whenever they are read."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifacts import card as cards
from trimtab.artifacts import card as tensors
from trimtab.artifacts.card import Card
from trimtab.errors import ArtefactError
from trimtab.model.base_model import BaseModel
from trimtab.types import MAX_ROWS

FILE = "prefix.safetensors"
MAX_MIB = 64


@dataclass(frozen=True)
class Prefix:
    """`vectors` is float32 [k, d], in the space of the embedding table's rows (before any scaling the model applies)."""

    vectors: Tensor
    card: Card

    @cached_property
    def salt(self) -> str:
        """Keeps KV cache of different prefixes apart: a hash of the vectors, not of their name."""
        return self.card.digest[:32]


def digest(vectors: Tensor) -> str:
    """SHA-256 of the vectors' float32 bytes, in hex."""
    return hashlib.sha256(vectors.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def make(vectors: Tensor, card: Card) -> Prefix:
    """A prefix of new vectors [k, d]: shape and digest are written into the card. Raises ArtefactError as `load` does."""
    vectors = vectors.detach().cpu().float().contiguous()
    rows, width = vectors.shape
    prefix = Prefix(vectors, replace(card, rows=rows, width=width, digest=digest(vectors)))
    _check(prefix, "new prefix")
    return prefix


def save(prefix: Prefix, folder: Path) -> Path:
    """Write a prefix as a folder of two files; gives the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": prefix.vectors.contiguous()}, folder / FILE)
    cards.write(prefix.card, folder)
    return folder


def load(folder: Path, base: BaseModel | None = None) -> Prefix:
    """Read a prefix and check it, against a base model where one is given.

    Raises ArtefactError: truncated, pickled or foreign file; NaN or infinity; a shape or digest that is not the card's; more
    than 64 rows; another base model's width or fingerprint; an unknown card version.
    """
    folder = Path(folder)
    card = cards.read(folder)
    path = folder / FILE
    prefix = Prefix(read_tensor(path, "vectors"), card)
    _check(prefix, str(path))
    if base is not None:
        check_base(prefix, base)
    return prefix


def read_tensor(path: Path, name: str) -> Tensor:
    """The only tensor of a safetensors file; ArtefactError for a file that is missing, too large, damaged, or holds another."""
    found = tensors.read_tensors(path, "a prefix", MAX_MIB)
    if set(found) != {name}:
        raise ArtefactError(f"{path} must hold one tensor named {name}, not {sorted(found)[:5]}")
    return found[name]


def check_base(prefix: Prefix, base: BaseModel) -> None:
    """ArtefactError unless the prefix was made for exactly this base model."""
    card = prefix.card
    if card.width != base.width:
        raise ArtefactError(f"prefix {card.name!r} has width {card.width}; base model {base.name} has {base.width}")
    if card.fingerprint != base.fingerprint:
        raise ArtefactError(
            f"prefix {card.name!r} was made for base model {card.base} ({card.fingerprint}), not for {base.name} "
            f"({base.fingerprint}): train it again on this one"
        )


def _check(prefix: Prefix, where: str) -> None:
    vectors, card = prefix.vectors, prefix.card
    if vectors.ndim != 2 or vectors.dtype != torch.float32:
        raise ArtefactError(f"{where}: vectors must be float32 [k, d], not {vectors.dtype} {list(vectors.shape)}")
    if not 1 <= vectors.shape[0] <= MAX_ROWS:
        raise ArtefactError(f"{where}: {vectors.shape[0]} rows; a prefix has 1 to {MAX_ROWS}")
    if tuple(vectors.shape) != (card.rows, card.width):
        raise ArtefactError(f"{where}: vectors are {list(vectors.shape)}, the card says {[card.rows, card.width]}")
    if not torch.isfinite(vectors).all():
        raise ArtefactError(f"{where}: the vectors hold NaN or infinity")
    if digest(vectors) != card.digest:
        raise ArtefactError(f"{where}: the vectors are not those of the card (digest differs)")

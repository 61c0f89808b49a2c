"""The refusal head: a logistic regression on one layer of the frozen model, kept as safetensors + JSON (ours).

Its normaliser is folded into its weights: what is kept is a plain linear map of raw hidden states, d weights and a bias.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifacts import card as cards
from trimtab.artifacts.prefix import compute_digest, read_single_tensor
from trimtab.errors import ArtifactError, UsageError
from trimtab.judges.human_agreement import JudgeAgreement, parse_agreement
from trimtab.model.base_model import BaseModel
from trimtab.stats.logistic import fit_logistic

FILE = "head.safetensors"
KIND = "refusal-head"
HEAD_VERSION = 1


@dataclass(frozen=True)
class RefusalHeadCard:
    """What a head is.

    `base` and `fingerprint` name the frozen model that it reads with; `layer` counts from 0, the embeddings, to the number of
    layers; `tokens` of an answer's opening are read, in the type `precision`; `l2` is the penalty it was fitted with; `digest`
    the SHA-256 of its float32 bytes; `data` one entry {name, digest, rows} per set of labels; `agreements` how it stands
    against labels that it was not fitted on, by cross-validation over `folds` folds.
    """

    base: str
    fingerprint: str
    width: int
    layer: int
    tokens: int
    precision: str
    l2: float
    folds: int
    digest: str
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    agreements: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    kind: str = KIND
    head_version: int = HEAD_VERSION


@dataclass(frozen=True)
class RefusalHead:
    """`weights` is float32 [d + 1]: one weight for each dimension of the hidden state, and the bias."""

    weights: Tensor
    card: RefusalHeadCard

    def list_agreements(self) -> list[JudgeAgreement]:
        """How it stands against labels, as its card has it."""
        return [parse_agreement(raw, "card of the classifier") for raw in self.card.agreements]


def fit_weights(states: Tensor, refused: Tensor, l2: float) -> Tensor:
    """Weights and bias, float64 [d + 1], of the logistic regression of `refused` [n] on hidden states [n, d] (see logistic.py).

    Raises UsageError where one class is missing.
    """
    if refused.all() or not refused.any():
        raise UsageError("a classifier needs answers that are refusals and answers that are not: give labels of both kinds")
    return fit_logistic(states, refused, l2)


def build_head(weights: Tensor, card: RefusalHeadCard) -> RefusalHead:
    """A head of new weights [d + 1]: width and digest are written into the card."""
    weights = weights.detach().cpu().float().contiguous()
    head = RefusalHead(weights, replace(card, width=len(weights) - 1, digest=compute_digest(weights)))
    _check_head(head, "new classifier")
    return head


def save_head(head: RefusalHead, folder: Path) -> Path:
    """Write a head as a folder of two files; gives the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"head": head.weights}, folder / FILE)
    (folder / cards.FILE).write_text(json.dumps(asdict(head.card), indent=2, sort_keys=True) + "\n")
    return folder


def load_head(folder: Path, base: BaseModel) -> RefusalHead:
    """Read a head and check it against the base model that it is to read with.

    Raises ArtifactError: a folder without its two files; a truncated, pickled or foreign file; NaN or infinity; a shape or
    digest that is not the card's; another base model's width or fingerprint; a card of another kind or an unknown version.
    """
    head = RefusalHead(read_single_tensor(folder / FILE, "head"), _read_head_card(folder / cards.FILE))
    _check_head(head, str(folder / FILE))
    head.list_agreements()
    card = head.card
    if (card.fingerprint, card.width) != (base.fingerprint, base.width):
        raise ArtifactError(
            f"the classifier in {folder} reads with base model {card.base} ({card.fingerprint}), not with {base.name} "
            f"({base.fingerprint}): fit one for it with trimtab judges --fit"
        )
    return head


def _read_head_card(path: Path) -> RefusalHeadCard:
    if not path.exists():
        raise ArtifactError(f"{path.parent} has no {path.name}; trimtab judges --fit makes a classifier")
    raw = cards.read_json_object(path, "a card")
    if raw.get("kind") != KIND:
        raise ArtifactError(f"{path} is the card of a {raw.get('kind')!r}, not of a {KIND}")
    if raw.get("head_version") != HEAD_VERSION:
        raise ArtifactError(
            f"{path} has version {raw.get('head_version')!r}; this trimtab reads {HEAD_VERSION}: update trimtab"
        )
    known = {f.name for f in fields(RefusalHeadCard)}
    if set(raw) != known:
        raise ArtifactError(f"{path}: missing fields {sorted(known - set(raw))}, unknown fields {sorted(set(raw) - known)}")
    _check_types(raw, path)
    return RefusalHeadCard(**raw)


def _check_types(raw: dict[str, Any], path: Path) -> None:
    whole: Sequence[tuple[str, int]] = (("width", 1), ("layer", 0), ("tokens", 1), ("folds", 0))
    if bad := [name for name, least in whole if type(raw[name]) is not int or raw[name] < least]:
        raise ArtifactError(f"{path}: {bad[0]} must be a whole number, not {raw[bad[0]]!r}")
    if bad := [name for name in ("base", "fingerprint", "digest") if not isinstance(raw[name], str)]:
        raise ArtifactError(f"{path}: {bad[0]} must be text")
    if raw["precision"] not in ("bf16", "fp32") or not isinstance(raw["agreements"], list):
        raise ArtifactError(f"{path}: precision must be bf16 or fp32, and agreements a list")


def _check_head(head: RefusalHead, where: str) -> None:
    weights, card = head.weights, head.card
    if weights.dtype != torch.float32 or tuple(weights.shape) != (card.width + 1,):
        raise ArtifactError(
            f"{where}: the head is {weights.dtype} {list(weights.shape)}, the card says float32 {[card.width + 1]}"
        )
    if not torch.isfinite(weights).all():
        raise ArtifactError(f"{where}: the head holds NaN or infinity")
    if compute_digest(weights) != card.digest:
        raise ArtifactError(f"{where}: the head is not that of the card (digest differs)")

"""Refusal head: a logistic regression on one layer of the frozen model, stored as safetensors and a JSON card.

The normalization is folded into the weights. The stored head is a linear map of raw hidden states with d weights and a bias.
The format is specific to trimtab.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifacts import card as cards
from trimtab.artifacts.prefix import check_tensor, compute_digest, read_single_tensor
from trimtab.errors import UsageError
from trimtab.judges.human_agreement import JudgeAgreement, parse_agreement
from trimtab.model.base_model import BaseModel
from trimtab.stats.logistic import fit_logistic

FILE = "head.safetensors"
KIND = "refusal-head"
# Fields of the card by their names in version 1.
RENAMED = {"tokens": "max_answer_tokens", "precision": "dtype"}


@dataclass(frozen=True)
class RefusalHeadCard:
    """Card of a refusal head.

    Attributes:
        base: name of the base model.
        fingerprint: base model fingerprint.
        width: dimension d of the hidden states.
        layer: layer of the hidden states, from 0 (embeddings) to the number of layers.
        max_answer_tokens: maximum tokens of the opening of an answer.
        dtype: precision of the base model, bf16 or fp32.
        l2: L2 penalty of the fit.
        folds: number of cross-validation folds behind `agreements`.
        digest: SHA-256 of the float32 bytes of the weights.
        data: one entry {name, digest, rows} per set of labels.
        agreements: agreement with labels out of fold, one entry per set of labels.
        kind: kind of the card.
        card_version: version of the card's format.
    """

    __pydantic_config__: ClassVar[ConfigDict] = cards.STRICT

    base: str
    fingerprint: str
    width: Annotated[int, Field(ge=1)]
    layer: Annotated[int, Field(ge=0)]
    max_answer_tokens: Annotated[int, Field(ge=1)]
    dtype: Literal["bf16", "fp32"]
    l2: float
    folds: Annotated[int, Field(ge=0)]
    digest: str
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    agreements: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    kind: str = KIND
    card_version: int = cards.CARD_VERSION


@dataclass(frozen=True)
class RefusalHead:
    """Refusal head with its card.

    Attributes:
        weights: float32 [d + 1], one weight per dimension of the hidden state, then the bias.
        card: card of the head.
    """

    weights: Tensor
    card: RefusalHeadCard

    def list_agreements(self) -> list[JudgeAgreement]:
        """Return the agreements with labels on the card.

        Raises:
            ArtifactError: if the card has an invalid agreement.
        """
        return [parse_agreement(raw, "card of the classifier") for raw in self.card.agreements]


def fit_weights(states: Tensor, refused: Tensor, l2: float) -> Tensor:
    """Fit a logistic regression of refusals on hidden states; see `trimtab.stats.logistic.fit_logistic`.

    Args:
        states: hidden states [n, d].
        refused: labels, bool [n].
        l2: L2 penalty.

    Returns:
        Weights and bias, float64 [d + 1].

    Raises:
        UsageError: if one class is missing.
    """
    if refused.all() or not refused.any():
        raise UsageError("a classifier needs answers that are refusals and answers that are not: give labels of both kinds")
    return fit_logistic(states, refused, l2)


def build_head(weights: Tensor, card: RefusalHeadCard) -> RefusalHead:
    """Build a head from new weights.

    Args:
        weights: weights and bias [d + 1].
        card: card of the head. Its width and digest are replaced by those of the weights.

    Raises:
        ArtifactError: if the weights contain NaN or infinity.
    """
    weights = weights.detach().cpu().float().contiguous()
    head = RefusalHead(weights, replace(card, width=len(weights) - 1, digest=compute_digest(weights)))
    _check_head(head, "new classifier")
    return head


def save_head(head: RefusalHead, folder: Path) -> Path:
    """Write the weights and the card of a head into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"head": head.weights}, folder / FILE)
    cards.write_card(head.card, folder)
    return folder


def load_head(folder: Path, base: BaseModel) -> RefusalHead:
    """Read a head and check it against a base model.

    Args:
        folder: folder with the weights and the card.
        base: base model to use the head with.

    Raises:
        ArtifactError: if a file is missing, truncated, pickled or of another format; the weights contain NaN or infinity, or do
            not match the shape or digest on the card; the head was fitted on another base model; or the card has another kind
            or an unknown version.
    """
    head = RefusalHead(read_single_tensor(folder / FILE, "head"), _read_head_card(folder))
    _check_head(head, str(folder / FILE))
    head.list_agreements()
    cards.check_base_model(head.card, base, f"the classifier in {folder}", "Fit another one with trimtab judges --fit")
    return head


def _read_head_card(folder: Path) -> RefusalHeadCard:
    card = cards.read_card_as(RefusalHeadCard, folder, KIND, RENAMED)
    # Version 1 named the count of predicted refusals `said`.
    agreements = [{"predicted" if k == "said" else k: value for k, value in entry.items()} for entry in card.agreements]
    return replace(card, agreements=agreements)


def _check_head(head: RefusalHead, location: str) -> None:
    check_tensor(head.weights, (head.card.width + 1,), head.card.digest, f"{location}: the weights")

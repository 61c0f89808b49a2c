"""A detector: a head with its normaliser, calibration and card, which gives the risk that an answer is made up.

On disk it is a folder of two files, `detector.safetensors` and `card.json`, and nothing in it is run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab import heads
from trimtab.artifacts.card import read_json_object, read_tensors
from trimtab.detection import calibration
from trimtab.detection.calibration import ALARMS
from trimtab.detection.signals import TRACE, compute_trace_features
from trimtab.errors import ArtifactError, TrimtabError
from trimtab.generation_types import Signals
from trimtab.heads import Head
from trimtab.model.base_model import BaseModel
from trimtab.util.atomic_files import write_atomic

CARD_VERSION = 1
FILE, CARD = "detector.safetensors", "card.json"
MAX_MIB = 1024
# What stands beside the head's own tensors: means and deviations of phi, and Platt's slope and offset.
NORMALISER, CALIBRATION = "phi", "platt"
HEAD = "head."


@dataclass(frozen=True)
class DetectorCard:
    """What a detector is.

    `base` and `fingerprint` name the frozen model whose signals it reads, at `layers` (0 is the embeddings), of `width`; `head`
    and `settings` its network; `low` the log-probability tau_l below which a token counts as low; `thresholds` the risk that is
    flagged, by share of false alarms; `prefix` the digest of the prefix under which the answers were written, or None;
    `digest` the SHA-256 of its tensors; `method`, `data`, `metrics` and `run_id` as in a prefix's card.
    """

    name: str
    base: str
    fingerprint: str
    layers: list[int]
    width: int
    head: str
    settings: dict[str, Any]
    low: float
    thresholds: dict[str, float]
    digest: str = ""
    prefix: str | None = None
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    run_id: str | None = None
    kind: str = "detector"
    card_version: int = CARD_VERSION


@dataclass(frozen=True)
class Detector:
    """A head that is done learning. `normaliser` [2, 7]: mean and deviation of phi over the training answers; `calibration`
    [2]: slope and offset that make a score the log-odds of a right answer (Platt 1999)."""

    card: DetectorCard
    head: Head
    normalizer: Tensor
    calibration: Tensor

    @torch.no_grad()
    def compute_risk(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Probability [N] that answers are made up, from psi [N, L, 3d] at the card's layers and phi [N, 7] as it comes."""
        score = self.head(psi, normalize_features(phi, self.normalizer))
        return calibration.compute_risk(score, self.calibration)

    def score_answer(self, seen: Signals, layers: Sequence[int]) -> float:
        """Probability that one answer is made up, from what an engine that captures `layers` saw of it. Raises ValueError where
        it does not capture those of the card."""
        psi = seen.psi[[layers.index(layer) for layer in self.card.layers]]
        logp, entropy, margin = seen.history.unbind(1)
        return self.compute_risk(psi[None], compute_trace_features(logp, entropy, margin, self.card.low)[None]).item()

    def flagged(self, risk: Tensor, alarms: str = "0.05") -> Tensor:
        """Whether risks [N] are above the threshold for this share of false alarms."""
        return risk > self.card.thresholds[alarms]


def normalize_features(phi: Tensor, normaliser: Tensor) -> Tensor:
    """phi [N, 7] z-scored by means and deviations [2, 7]; the raw number of tokens would swamp the rest."""
    return (phi - normaliser[0]) / normaliser[1]


def build_detector(head: Head, normaliser: Tensor, calibration: Tensor, card: DetectorCard) -> Detector:
    """A detector of what was learned; its digest is written into the card."""
    head.eval()
    return Detector(
        replace(card, digest=_compute_digest(_collect_tensors(head, normaliser, calibration))), head, normaliser, calibration
    )


def save_detector(detector: Detector, folder: Path) -> Path:
    """Write a detector as a folder of two files; gives the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_collect_tensors(detector.head, detector.normalizer, detector.calibration), folder / FILE)
    write_atomic(folder / CARD, json.dumps(asdict(detector.card), indent=2, sort_keys=True) + "\n")
    return folder


def load_detector(folder: Path, base: BaseModel | None = None) -> Detector:
    """Read a detector and check it, against a base model where one is given.

    Raises ArtifactError: a missing, truncated, pickled or foreign file; NaN or infinity; tensors that are not those of the
    card's head; a digest that differs; another base model's width or fingerprint; an unknown card version or head.
    """
    folder = Path(folder)
    card = _read_card(folder)
    if base is not None:
        check_base(card, base)
    held = _read_tensors(folder / FILE)
    if _compute_digest(held) != card.digest:
        raise ArtifactError(f"{folder / FILE}: the tensors are not those of the card (digest differs)")
    try:
        head = heads.get_head(card.head)(card.width, len(card.layers), **card.settings)
        head.load_state_dict({name.removeprefix(HEAD): t for name, t in held.items() if name.startswith(HEAD)})
        normaliser, calibration = held[NORMALISER].view(2, len(TRACE)), held[CALIBRATION].view(2)
    except (KeyError, RuntimeError, TypeError, TrimtabError) as error:
        raise ArtifactError(f"{folder}: {FILE} does not hold the head that the card tells of ({card.head})") from error
    return Detector(card, head.eval(), normaliser, calibration)


def check_base(card: DetectorCard, base: BaseModel) -> None:
    """ArtifactError unless the detector was made for exactly this base model."""
    if (card.width, card.fingerprint) != (base.width, base.fingerprint):
        raise ArtifactError(
            f"detector {card.name!r} reads base model {card.base} ({card.fingerprint}), not {base.name} ({base.fingerprint}): "
            "collect and train it again on this one"
        )


def _collect_tensors(head: Head, normaliser: Tensor, calibration: Tensor) -> dict[str, Tensor]:
    own = {f"{HEAD}{name}": tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}
    return own | {NORMALISER: normaliser.float().contiguous(), CALIBRATION: calibration.float().contiguous()}


def _compute_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    found = read_tensors(path, "a detector", MAX_MIB)
    if not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in found.values()):
        raise ArtifactError(f"{path} holds NaN, infinity, or numbers that are not float32")
    return found


def _read_card(folder: Path) -> DetectorCard:
    path = folder / CARD
    if not path.exists():
        raise ArtifactError(f"{folder} has no {CARD}; a detector is a folder with a card and a safetensors file")
    raw = read_json_object(path, "a card")
    if raw.get("kind") != "detector" or raw.get("card_version") != CARD_VERSION:
        said = f"{raw.get('kind')!r}, version {raw.get('card_version')!r}"
        raise ArtifactError(f"{path} is a card of kind {said}; this trimtab reads detector, version {CARD_VERSION}")
    names = {f.name for f in fields(DetectorCard)}
    needed = {"name", "base", "fingerprint", "layers", "width", "head", "settings", "low", "thresholds", "digest"}
    if needed - raw.keys() or raw.keys() - names:
        raise ArtifactError(
            f"{path}: missing fields {sorted(needed - raw.keys())}, unknown fields {sorted(raw.keys() - names)}"
        )
    limits = raw["thresholds"]
    if not isinstance(limits, dict) or limits.keys() != set(ALARMS) or not all(isinstance(v, float) for v in limits.values()):
        raise ArtifactError(f"{path}: thresholds must be risks by the shares of false alarms {', '.join(ALARMS)}")
    return DetectorCard(**raw)

"""Detector: a head with normalizer, calibration and card that estimates a risk: that an answer is made up or a prompt harmful.

On disk a detector is a folder with `detector.safetensors` and `card.json`. Loading it executes no code.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from trimtab import heads
from trimtab.artifacts.card import check_base_model, read_tensors, write_card
from trimtab.detection import calibration
from trimtab.detection.detector_card import DetectorCard, read_detector_card
from trimtab.detection.label_heads import LabelHeads
from trimtab.detection.signals import (
    CHECK_INTERVAL,
    TRACE,
    build_window_states,
    compute_running_features,
    compute_trace_features,
)
from trimtab.errors import ArtifactError, TrimtabError, UsageError
from trimtab.generation_types import Signals
from trimtab.model.base_model import BaseModel

FILE = "detector.safetensors"
MAX_MIB = 1024
# Tensors besides those of the head: means and standard deviations of phi, and Platt's slope and offset.
NORMALIZER, CALIBRATION = "phi", "platt"
HEAD = "head."


@dataclass(frozen=True)
class Detector:
    """Trained detector.

    Attributes:
        card: card of the detector.
        head: trained head, in evaluation mode: a `Head`, or `LabelHeads` for several labels.
        normalizer: mean and standard deviation of phi over the training answers [2, 7].
        calibration: slope and offset [2] that map a score to the log-odds of a right answer (Platt 1999).
    """

    card: DetectorCard
    head: nn.Module
    normalizer: Tensor
    calibration: Tensor

    @property
    def nbytes(self) -> int:
        """Size of the head's weights in bytes."""
        return sum(tensor.nbytes for tensor in self.head.state_dict().values())

    @property
    def reads_trace(self) -> bool:
        """Whether the risk depends on the statistics of the answer's tokens. A prompt has none."""
        return self.card.subject == "answer" and bool(getattr(self.head, "reads_trace", True))

    @torch.no_grad()
    def compute_risk(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the probability that answers are made up or prompts are harmful.

        Args:
            psi: features [N, L, 3d] at the card's layers.
            phi: trace features [N, 7], not normalized.

        Returns:
            Risks [N].
        """
        score = self.head(psi, normalize_features(phi, self.normalizer))
        return calibration.compute_risk(score, self.calibration)

    def score_prompts(self, psi: Tensor, windows: Sequence[Tensor | None] = ()) -> Tensor:
        """Compute the probability that prompts are harmful.

        Args:
            psi: features [N, L, 3d] of the prompts at the card's layers, on the device of the detector.
            windows: mean states of the windows of each prompt [W, L, d], if the detector reads windows; None for prompts of one
                window.

        Returns:
            Risks [N].
        """
        # A prompt has no phi; training sets it to zeros as well.
        phi = normalize_features(psi.new_zeros(len(psi), len(TRACE)), self.normalizer)
        pairs = zip(psi, windows, strict=True) if self.card.windows and windows else ()
        states = [None if window is None else build_window_states(row, window) for row, window in pairs]
        return calibration.compute_risk(heads.score_with_windows(self.head, psi, phi, states), self.calibration)

    def score_unfinished(self, running: Tensor, history: Tensor) -> Tensor:
        """Compute the risks of one answer before its end, at every `CHECK_INTERVAL` tokens.

        Args:
            running: features [K, L, 3d] of the unfinished answer at the card's layers.
            history: log-probability, entropy and margin of each token [m, 3].

        Returns:
            Risks [K].
        """
        if not len(running):
            return torch.empty(0)
        lengths = CHECK_INTERVAL * torch.arange(1, len(running) + 1)
        return self.compute_risk(running.float(), self.compute_trace(history.expand(len(running), -1, -1), lengths))

    def compute_trace(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Compute phi [N, 7] of the first tokens of N answers; zeros if the head does not read it.

        Args:
            history: log-probability, entropy and margin of each token [N, m, 3]; not read if the head reads no phi.
            lengths: numbers of first tokens [N].
        """
        if not self.reads_trace:
            return self.normalizer.new_zeros(len(lengths), len(TRACE))
        return compute_running_features(history, lengths, self.card.low_log_probability)

    def select_label(self, label: str | None) -> "Detector":
        """Return the detector of one label; the detector itself for None.

        Raises:
            UsageError: if the detector does not have this label.
        """
        if label is None:
            return self
        if not isinstance(self.head, LabelHeads) or label not in self.card.label_thresholds:
            names = ", ".join(self.card.label_thresholds) or "no labels"
            raise UsageError(f"detector {self.card.name!r} has {names}; not label {label!r}")
        selected = self.head.get_label(label)
        thresholds, digest = self.card.label_thresholds[label], f"{self.card.digest}:{label}"
        card = replace(self.card, digest=digest, thresholds=thresholds, label_thresholds={})
        return Detector(card, selected.head, self.normalizer, selected.calibration)

    def to(self, device: torch.device) -> "Detector":
        """Return the detector with its tensors on a device."""
        return Detector(self.card, self.head.to(device), self.normalizer.to(device), self.calibration.to(device))

    def score_answer(self, signals: Signals, layers: Sequence[int]) -> float:
        """Compute the probability that one answer is made up, from the signals that an engine captured.

        Args:
            signals: captured signals of the answer.
            layers: layers that the engine captures.

        Raises:
            ValueError: if the engine does not capture all layers of the card.
        """
        psi = signals.psi[[layers.index(layer) for layer in self.card.layers]]
        if self.reads_trace:
            logp, entropy, margin = signals.history.unbind(1)
            phi = compute_trace_features(logp, entropy, margin, self.card.low_log_probability)
        else:
            phi = self.normalizer.new_zeros(len(TRACE))
        return self.compute_risk(psi[None], phi[None]).item()


def normalize_features(phi: Tensor, normalizer: Tensor) -> Tensor:
    """Standardize trace features; without this, the token count would dominate.

    Args:
        phi: trace features [N, 7].
        normalizer: means and standard deviations [2, 7].
    """
    return (phi - normalizer[0]) / normalizer[1]


def build_detector(head: nn.Module, normalizer: Tensor, calibration: Tensor, card: DetectorCard) -> Detector:
    """Build a detector from its trained parts, and write the digest of its tensors into the card.

    Args:
        head: trained head.
        normalizer: means and standard deviations of phi [2, 7].
        calibration: slope and offset of Platt scaling [2].
        card: card without digest.
    """
    head.eval()
    return Detector(
        replace(card, digest=_compute_digest(_collect_tensors(head, normalizer, calibration))), head, normalizer, calibration
    )


def save_detector(detector: Detector, folder: Path) -> Path:
    """Write a detector to a folder, which is created on demand.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_collect_tensors(detector.head, detector.normalizer, detector.calibration), folder / FILE)
    write_card(detector.card, folder)
    return folder


def encode_detector(detector: Detector) -> tuple[str, bytes]:
    """Encode a detector for another process of the engine.

    Returns:
        Card as JSON, and tensors as the bytes of a safetensors file.
    """
    tensors = save(_collect_tensors(detector.head, detector.normalizer, detector.calibration))
    return json.dumps(asdict(detector.card)), tensors


def decode_detector(card: str, tensors: bytes) -> Detector:
    """Return the detector that `encode_detector` encoded. Its digest was checked when it was loaded."""
    return _assemble_detector(TypeAdapter(DetectorCard).validate_json(card), load(tensors))


def load_detector(folder: Path, base: BaseModel | None = None) -> Detector:
    """Load a detector and verify its files.

    Args:
        folder: folder of the detector.
        base: base model that the detector must match, or None to skip this check.

    Raises:
        ArtifactError: if a file is missing, truncated, pickled or of another format; a tensor contains NaN or infinity; the
            tensors do not match the card's head or digest; the base model has another width or fingerprint; or the card's
            version or head is unknown.
    """
    folder = Path(folder)
    card = read_detector_card(folder)
    if base is not None:
        check_base(card, base)
    tensors = _read_tensors(folder / FILE)
    if _compute_digest(tensors) != card.digest:
        raise ArtifactError(f"{folder / FILE}: the tensors are not those of the card (digest differs)")
    try:
        return _assemble_detector(card, tensors)
    except (KeyError, RuntimeError, TypeError, ValueError, TrimtabError) as error:
        raise ArtifactError(f"{folder}: {FILE} does not hold the head that the card names ({card.head})") from error


def check_base(card: DetectorCard, base: BaseModel) -> None:
    """Raise ArtifactError unless the detector was made for exactly this base model."""
    check_base_model(card, base, f"detector {card.name!r}", "Collect signals and train a detector on this base model")


def _assemble_detector(card: DetectorCard, tensors: Mapping[str, Tensor]) -> Detector:
    head = _build_head(card, {name.removeprefix(HEAD): t for name, t in tensors.items() if name.startswith(HEAD)})
    return Detector(card, head.eval(), tensors[NORMALIZER].view(2, len(TRACE)), tensors[CALIBRATION].view(2))


def _build_head(card: DetectorCard, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build the head of a card with its weights.

    The settings on the card could name a head of any size. Its shapes are therefore compared before any memory is allocated.
    """
    build_one = partial(heads.get_head(card.head), card.width, len(card.layers), **card.head_options)

    def build() -> nn.Module:
        return LabelHeads({label: build_one() for label in card.label_thresholds}) if card.label_thresholds else build_one()

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError("the tensors have other shapes")
    head = build()
    head.load_state_dict(weights)
    return head


def _collect_tensors(head: nn.Module, normalizer: Tensor, calibration: Tensor) -> dict[str, Tensor]:
    tensors = {f"{HEAD}{name}": tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}
    return tensors | {NORMALIZER: normalizer.float().contiguous(), CALIBRATION: calibration.float().contiguous()}


def _compute_digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 over names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path, "a detector", MAX_MIB)
    if not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in tensors.values()):
        raise ArtifactError(f"{path} holds NaN, infinity, or numbers that are not float32")
    return tensors

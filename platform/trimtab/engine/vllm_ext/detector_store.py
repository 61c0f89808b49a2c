"""Detectors inside the engine's worker."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.detection.detector import Detector, decode_detector


class DetectorStore:
    """Detectors that the worker applies, by digest.

    Args:
        layers: captured layers.
        device: device of the states.

    Attributes:
        device: device of the states.
    """

    def __init__(self, layers: Sequence[int], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._layers = list(layers)
        self._detectors: dict[str, Detector] = {}

    def add_detector(self, card: str, tensors: bytes) -> None:
        """Add a detector from the result of `encode_detector`."""
        detector = decode_detector(card, tensors)
        self._detectors[detector.card.digest] = detector.to(self.device)

    def remove_detector(self, digest: str) -> None:
        """Remove a detector. Checks that name it have no risk afterwards."""
        self._detectors.pop(digest, None)

    def get_detector(self, digest: str) -> Detector | None:
        """Return a detector; None if the worker does not have it."""
        return self._detectors.get(digest)

    def select_layers(self, detector: Detector, features: Tensor) -> Tensor:
        """Return the features [N, L', …] of a detector's layers from those of the captured layers [N, L, …]."""
        return features[:, [self._layers.index(layer) for layer in detector.card.layers]]

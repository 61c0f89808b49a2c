"""Checks of prompts inside the engine's worker, in the step that ends their prefill.

The risks are computed between the forward pass and sampling, from states that the signal capture holds already. Risks and
decisions stay on the device, so that a check adds no synchronization to the step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.detection.detector import Detector, decode_detector
from trimtab.engine.prompt_check import MAX_CHECKS, PromptCheck


class PromptChecker:
    """Detectors of prompts in the worker, and the risks that they computed.

    Args:
        layers: captured layers.
        slots: number of slots for requests.
        device: device of the states.
    """

    def __init__(self, layers: Sequence[int], slots: int, device: torch.device | str) -> None:
        self._layers = list(layers)
        self._device = torch.device(device)
        self._detectors: dict[str, Detector] = {}
        self._risks = torch.full((slots, MAX_CHECKS), torch.nan, dtype=torch.float64, device=self._device)

    def add_detector(self, card: str, tensors: bytes) -> None:
        """Add a detector from the result of `encode_detector`."""
        detector = decode_detector(card, tensors)
        self._detectors[detector.card.digest] = detector.to(self._device)

    def remove_detector(self, digest: str) -> None:
        """Remove a detector. Checks that name it have no risk afterwards."""
        self._detectors.pop(digest, None)

    def check_prompts(self, checks: Sequence[Sequence[PromptCheck]], slots: Tensor, psi: Tensor) -> Tensor:
        """Compute the risks of prompts, and decide which requests end.

        Args:
            checks: checks of each prompt [n].
            slots: slot of each request [n]; its risks are stored until the slot is used again.
            psi: features of the prompts at the captured layers [n, L, 3d].

        Returns:
            Whether each request ends [n].
        """
        risks = torch.full((len(slots), MAX_CHECKS), torch.nan, dtype=torch.float64, device=self._device)
        for digest in {check.digest for listed in checks for check in listed}:
            if (detector := self._detectors.get(digest)) is None:
                continue
            places = [(row, n) for row, listed in enumerate(checks) for n, check in enumerate(listed) if check.digest == digest]
            rows, columns = torch.tensor(places, device=self._device).T
            layers = [self._layers.index(layer) for layer in detector.card.layers]
            risks[rows, columns] = detector.score_prompts(psi[rows][:, layers]).double()
        self._risks[slots] = risks
        return self._select_stopped(checks, risks)

    def list_risks(self, slot: int, count: int) -> list[float]:
        """Return the risks of the first `count` checks of the request in a slot; NaN for unknown ones."""
        return self._risks[slot, :count].tolist()

    def _select_stopped(self, checks: Sequence[Sequence[PromptCheck]], risks: Tensor) -> Tensor:
        padding = PromptCheck("", 0.0)
        padded = [[*listed, *[padding] * (MAX_CHECKS - len(listed))] for listed in checks]
        values = [[(c.threshold, c.above, c.stops, c.required) for c in listed] for listed in padded]
        threshold, above, stops, required = torch.tensor(values, dtype=torch.float64, device=self._device).unbind(-1)
        triggered = (risks > threshold) == above.bool()
        unknown = ~risks.isfinite()
        return (stops.bool() & torch.where(unknown, required.bool(), triggered)).any(1)

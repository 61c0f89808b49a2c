"""Checks of prompts inside the engine's worker, in the step that ends their prefill.

The risks are computed between the forward pass and sampling, from states that the signal capture holds already. Risks and
decisions stay on the device, so that a check adds no synchronization to the step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.detection.detector import Detector
from trimtab.engine.checks import MAX_CHECKS, PromptCheck
from trimtab.engine.vllm_ext.detector_store import DetectorStore


class PromptChecker:
    """Checks of prompts by the detectors of the worker, and the risks that they computed.

    Args:
        store: detectors of the worker.
        slots: number of slots for requests.
    """

    def __init__(self, store: DetectorStore, slots: int) -> None:
        self._store = store
        self._risks = torch.full((slots, MAX_CHECKS), torch.nan, dtype=torch.float64, device=store.device)

    def reads_windows(self, checks: Sequence[PromptCheck]) -> bool:
        """Return whether a detector of the checks reads the windows of prompts."""
        detectors = (self._store.get_detector(check.digest) for check in checks)
        return any(detector is not None and detector.card.windows for detector in detectors)

    def check_prompts(
        self,
        checks: Sequence[Sequence[PromptCheck]],
        slots: Tensor,
        psi: Tensor,
        windows: Sequence[Tensor | None],
    ) -> Tensor:
        """Compute the risks of prompts, and decide which requests end.

        Args:
            checks: checks of each prompt [n].
            slots: slot of each request [n]; its risks are stored until the slot is used again.
            psi: features of the prompts at the captured layers [n, L, 3d].
            windows: mean states of the windows of each prompt [W, L, d]; None for prompts of one window.

        Returns:
            Whether each request ends [n].
        """
        risks = torch.full((len(slots), MAX_CHECKS), torch.nan, dtype=torch.float64, device=self._store.device)
        for digest in {check.digest for listed in checks for check in listed}:
            if (detector := self._store.get_detector(digest)) is None:
                continue
            places = [(row, n) for row, listed in enumerate(checks) for n, check in enumerate(listed) if check.digest == digest]
            rows, columns = torch.tensor(places, device=self._store.device).T
            selected = [self._select_windows(detector, windows[row]) for row, _ in places]
            risks[rows, columns] = detector.score_prompts(self._store.select_layers(detector, psi[rows]), selected).double()
        self._risks[slots] = risks
        return self._select_stopped(checks, risks)

    def list_risks(self, slot: int, count: int) -> list[float]:
        """Return the risks of the first `count` checks of the request in a slot; NaN for unknown ones."""
        return self._risks[slot, :count].tolist()

    def _select_windows(self, detector: Detector, windows: Tensor | None) -> Tensor | None:
        return None if windows is None else self._store.select_layers(detector, windows)

    def _select_stopped(self, checks: Sequence[Sequence[PromptCheck]], risks: Tensor) -> Tensor:
        padding = PromptCheck("", 0.0)
        most = max(map(len, checks))
        padded = [[*listed, *[padding] * (most - len(listed))] for listed in checks]
        values = [[(c.threshold, c.above, c.stops, c.required) for c in listed] for listed in padded]
        threshold, above, stops, required = torch.tensor(values, dtype=torch.float64, device=self._store.device).unbind(-1)
        triggered = (risks[:, :most] > threshold) == above.bool()
        unknown = ~risks[:, :most].isfinite()
        return (stops.bool() & torch.where(unknown, required.bool(), triggered)).any(1)

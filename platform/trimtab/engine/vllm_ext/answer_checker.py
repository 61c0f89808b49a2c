"""Checks of unfinished answers inside the engine's worker.

The risks are computed after sampling, from states that the signal capture holds already. As for prompts, risks and decisions
stay on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.engine.checks import AnswerCheck
from trimtab.engine.vllm_ext.detector_store import DetectorStore


class AnswerChecker:
    """Checks of answers by the detectors of the worker.

    Args:
        store: detectors of the worker.
    """

    def __init__(self, store: DetectorStore) -> None:
        self._store = store

    def check_answers(
        self, checks: Sequence[Sequence[AnswerCheck]], psi: Tensor, history: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Decide which answers end.

        Args:
            checks: checks of each answer [n].
            psi: features of the answers so far at the captured layers [n, L, 3d].
            history: log-probability, entropy and margin of each token [n, m, 3]; m is 0 if they are not stored.
            lengths: number of tokens of each answer [n].

        Returns:
            Whether each answer ends [n].
        """
        device = self._store.device
        triggered = torch.zeros(len(checks), dtype=torch.long, device=device)
        for digest in {check.digest for listed in checks for check in listed}:
            places = [(row, check) for row, listed in enumerate(checks) for check in listed if check.digest == digest]
            rows = torch.tensor([row for row, _ in places], device=device)
            limits = [(check.threshold, check.required) for _, check in places]
            threshold, required = torch.tensor(limits, dtype=torch.float64, device=device).unbind(1)
            risks = self._compute_risks(digest, rows, psi, history, lengths)
            stopped = torch.where(risks.isfinite(), risks > threshold, required.bool())
            triggered.index_add_(0, rows, stopped.long())
        return triggered > 0

    def _compute_risks(self, digest: str, rows: Tensor, psi: Tensor, history: Tensor, lengths: Sequence[int]) -> Tensor:
        if (detector := self._store.get_detector(digest)) is None:
            return torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)
        if detector.reads_trace and not history.shape[1]:
            return torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)
        phi = detector.compute_trace(history[rows], torch.tensor(lengths, device=rows.device)[rows])
        return detector.compute_risk(self._store.select_layers(detector, psi[rows]), phi).double()

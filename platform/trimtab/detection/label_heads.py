"""Head of a detector with several labels: one head and calibration per label."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.heads import Head

MAX_LABELS = 16


class LabelHead(nn.Module):
    """Head of one label with its calibration.

    Args:
        head: head of the label.

    Attributes:
        head: head of the label.
        calibration: slope and offset [2] of Platt scaling.
    """

    calibration: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("calibration", torch.zeros(2))

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the log-odds [N] of the label not to apply, from psi [N, L, 3d] and phi [N, 7]."""
        slope, offset = self.calibration
        return slope * self.head(psi, phi) + offset


class LabelHeads(nn.Module):
    """Heads of several labels, whose score is that of the riskiest label [ours].

    Args:
        heads: head by label.

    Attributes:
        labels: head and calibration by label.
    """

    def __init__(self, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.labels = nn.ModuleDict({label: LabelHead(head) for label, head in heads.items()})
        self.reads_trace = any(head.reads_trace for head in heads.values())

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the lowest log-odds [N] of the labels not to apply, from psi [N, L, 3d] and phi [N, 7]."""
        return torch.stack([label(psi, phi) for label in self.labels.values()], 1).min(1).values

    def get_label(self, label: str) -> LabelHead:
        """Return the head of a label with its calibration."""
        return cast(LabelHead, self.labels[label])


def combine_heads(heads: Mapping[str, Head], calibrations: Sequence[Tensor]) -> LabelHeads:
    """Return trained heads by label, with the calibration [2] of each, as one head."""
    combined = LabelHeads(heads)
    for label, calibration in zip(heads, calibrations, strict=True):
        combined.get_label(label).calibration.copy_(calibration)
    return combined

"""A logistic probe on the answer's last state: the common baseline."""

import torch
from torch import Tensor, nn

from trimtab.heads import DetectorRows, Head, compute_auroc, has_both_classes, register
from trimtab.stats.logistic import compute_logits, fit_logistic

# Penalties that are tried, the best on validation kept.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


@register("linear")
class Linear(Head):
    """s = w . h_end + b at the highest layer given, fitted to its optimum on z-scored states. `layers` is taken for the sake of
    one form."""

    joint = False

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.score = nn.Linear(width, 1)

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Score [N]."""
        return self.score(psi[:, -1, : self.width])[:, 0]

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Fit to the labelled rows with each penalty."""
        self.fit_to(train.labelled, train.labelled.truthful, validation)

    @torch.no_grad()
    def fit_to(self, train: DetectorRows, wanted: Tensor, validation: DetectorRows) -> None:
        """Fit to the targets `wanted` [N] of 0 and 1; the penalty with the best AUROC on validation is kept."""
        has_both_classes(wanted, "training")
        has_both_classes(validation.truthful, "validation")
        with torch.enable_grad():
            tried = [fit_logistic(train.end, wanted == 1, penalty) for penalty in PENALTIES]
        best = max(tried, key=lambda weights: compute_auroc(compute_logits(weights, validation.end), validation.truthful))
        self.score.weight.copy_(best[None, :-1])
        self.score.bias.copy_(best[-1:])

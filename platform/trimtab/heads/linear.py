"""A logistic probe on the answer's last state: the common baseline."""

import torch
from torch import Tensor, nn

from trimtab.heads import Head, Rows, auroc, both_classes, register
from trimtab.stats import logistic

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

    def fit(self, train: Rows, validation: Rows, seed: int) -> None:
        """Fit to the labelled rows with each penalty."""
        self.fit_to(train.labelled, train.labelled.truthful, validation)

    @torch.no_grad()
    def fit_to(self, train: Rows, wanted: Tensor, validation: Rows) -> None:
        """Fit to the targets `wanted` [N] of 0 and 1; the penalty with the best AUROC on validation is kept."""
        both_classes(wanted, "training")
        both_classes(validation.truthful, "validation")
        with torch.enable_grad():
            tried = [logistic.fit(train.end, wanted == 1, penalty) for penalty in PENALTIES]
        best = max(tried, key=lambda weights: auroc(logistic.logits(weights, validation.end), validation.truthful))
        self.score.weight.copy_(best[None, :-1])
        self.score.bias.copy_(best[-1:])

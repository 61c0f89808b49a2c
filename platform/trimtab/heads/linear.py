"""Linear head: a logistic probe on hidden states, the common baseline."""

import torch
from torch import Tensor, nn

from trimtab.heads import DetectorRows, Head, check_both_classes, compute_auroc, register
from trimtab.stats.logistic import compute_logits, fit_logistic

# Candidate penalties; the best one on validation is kept.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


@register("linear")
class Linear(Head):
    """Logistic probe s = w . h + b at the highest given layer, fitted to its optimum on standardized states.

    Args:
        width: width d of the base model.
        layers: not used; all heads take the same arguments.
        parts: number of parts of psi that h consists of: 1 is the last state, 2 adds the mean.
    """

    joint = False
    reads_trace = False

    def __init__(self, width: int, layers: int, parts: int = 1) -> None:
        super().__init__()
        self.score = nn.Linear(width * parts, 1)

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the scores [N] from psi [N, L, 3d]; phi is not used."""
        return self.score(self._read_states(psi))[:, 0]

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Fit the labeled rows with each penalty, and keep the one with the best AUROC on validation."""
        self.fit_to(train.labelled, train.labelled.truthful, validation)

    @torch.no_grad()
    def fit_to(self, train: DetectorRows, wanted: Tensor, validation: DetectorRows) -> None:
        """Fit binary targets with each penalty, and keep the one with the best AUROC on validation.

        Args:
            train: training rows.
            wanted: targets [N] of 0 and 1.
            validation: validation rows.

        Raises:
            UsageError: if the targets or the validation labels lack a class.
        """
        check_both_classes(wanted, "training")
        check_both_classes(validation.truthful, "validation")
        states, validation_states = self._read_states(train.psi), self._read_states(validation.psi)
        with torch.enable_grad():
            fits = [fit_logistic(states, wanted == 1, penalty) for penalty in PENALTIES]
        best = max(fits, key=lambda weights: compute_auroc(compute_logits(weights, validation_states), validation.truthful))
        self.score.weight.copy_(best[None, :-1])
        self.score.bias.copy_(best[-1:])

    def _read_states(self, psi: Tensor) -> Tensor:
        return psi[:, -1, : self.score.in_features]

"""HaloScope (Du et al. 2024): pseudo-labels from a subspace of unlabeled answers' states, and an MLP trained on them."""

import torch
from torch import Tensor, nn

from trimtab.heads import DetectorRows, EndStateMlp, compute_auroc, register, run_gradient_descent

# Candidate ranks of the subspace and shares of made-up answers; the best ones on validation are kept [paper].
RANKS, SHARES = range(1, 11), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Epochs after which the share is selected [trimtab]; full training runs would take three times as long.
FIRST = 4


@register("haloscope")
class Haloscope(EndStateMlp):
    """MLP on h_end at the highest given layer, trained on pseudo-labels [paper].

    zeta_i = (1/k) sum_j sigma_j <h_i - mean, v_j>^2 over the first k singular vectors. Answers on one side of a threshold of
    zeta count as made up. Training labels are not used. Validation labels select k, the threshold [paper] and the side
    [trimtab].

    Args:
        width: width d of the base model.
        layers: not used; all heads take the same arguments.
        hidden: width of the hidden layer.
    """

    taught = False

    def __init__(self, width: int, layers: int, hidden: int = 1024) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Derive pseudo-labels from the states of all training rows, and train the MLP on them.

        Args:
            train: training rows; their labels are not used.
            validation: validation rows.
            seed: seed of the training.
        """
        mean = train.end.mean(0)
        _, sigma, directions = torch.linalg.svd(train.end - mean, full_matrices=False)

        def zeta(rows: DetectorRows, rank: int) -> Tensor:
            return ((rows.end - mean) @ directions[:rank].T).square() @ sigma[:rank] / rank

        aurocs = [(rank, compute_auroc(zeta(validation, rank), validation.truthful)) for rank in RANKS if rank <= len(sigma)]
        rank, auroc = max(aurocs, key=lambda pair: abs(pair[1] - 0.5))
        pseudo_scores = zeta(train, rank) * (1 if auroc >= 0.5 else -1)
        initial = {name: value.clone() for name, value in self.state_dict().items()}

        def train_on_share(share: float, epochs: int | None = None) -> float:
            self.load_state_dict(initial)
            pseudo_labeled = DetectorRows(train.psi, train.phi, (pseudo_scores > pseudo_scores.quantile(share)).float())
            return run_gradient_descent(self, pseudo_labeled, validation, seed, epochs)

        train_on_share(max(SHARES, key=lambda share: train_on_share(share, FIRST)))

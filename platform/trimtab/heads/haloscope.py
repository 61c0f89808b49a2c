"""HaloScope (Du et al. 2024): a subspace of unlabelled answers' states guesses which are made up, and a network learns it."""

import torch
from torch import Tensor, nn

from trimtab.heads import DetectorRows, Head, compute_auroc, register, run_gradient_descent

# Sizes of the subspace and shares of answers taken for made up that are tried, the best on validation kept [paper: so too].
RANKS, SHARES = range(1, 11), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Epochs after which the share is chosen (ours: whole trainings take three times as long).
FIRST = 4


@register("haloscope")
class Haloscope(Head):
    """zeta_i = (1/k) sum_j sigma_j <h_i - mean, v_j>^2 over the first k singular vectors; answers on one side of a threshold
    are taken for made up, and an MLP learns to tell them [paper]. Training labels are not looked at; validation ones choose k,
    the threshold and the side (ours: the side). `layers` is taken for the sake of one form.

    Args:
        width: d of the base model.
        layers: number of layers in psi.
        hidden: width of the MLP's hidden layer.
    """

    joint, taught = False, False

    def __init__(self, width: int, layers: int, hidden: int = 1024) -> None:
        super().__init__()
        self.width = width
        self.network = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Score [N]."""
        return self.network(psi[:, -1, : self.width])[:, 0]

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Guess labels from the states of all training rows, then learn them."""
        mean = train.end.mean(0)
        _, sigma, directions = torch.linalg.svd(train.end - mean, full_matrices=False)

        def zeta(rows: DetectorRows, rank: int) -> Tensor:
            return ((rows.end - mean) @ directions[:rank].T).square() @ sigma[:rank] / rank

        tried = [(rank, compute_auroc(zeta(validation, rank), validation.truthful)) for rank in RANKS if rank <= len(sigma)]
        rank, reached = max(tried, key=lambda pair: abs(pair[1] - 0.5))
        guess = zeta(train, rank) * (1 if reached >= 0.5 else -1)
        start = {name: value.clone() for name, value in self.state_dict().items()}

        def learned(share: float, epochs: int | None = None) -> float:
            self.load_state_dict(start)
            guessed = DetectorRows(train.psi, train.phi, (guess > guess.quantile(share)).float())
            return run_gradient_descent(self, guessed, validation, seed, epochs)

        learned(max(SHARES, key=lambda share: learned(share, FIRST)))

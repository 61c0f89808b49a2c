"""MLP head on the features of FLaG without its groups, a baseline for the features alone [trimtab]."""

import torch
from torch import Tensor, nn

from trimtab.heads import Head, register


@register("mlp")
class Mlp(Head):
    """MLP on [Linear(psi) ; phi] as in FLaG, with one hidden layer and a logistic output.

    Args:
        width: width d of the base model.
        layers: number of layers in psi.
        projection: output width of the projection of psi.
        hidden: width of the hidden layer.
        dropout: dropout rate after the hidden layer.
    """

    def __init__(self, width: int, layers: int, projection: int = 256, hidden: int = 1024, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.Linear(3 * width * layers, projection)
        self.network = nn.Sequential(nn.Linear(projection + 7, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the scores [N] from psi [N, L, 3d] and phi [N, 7]."""
        return self.network(torch.cat([self.project(psi.flatten(1)), phi], 1))[:, 0]

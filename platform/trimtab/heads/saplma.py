"""SAPLMA (Azaria and Mitchell 2023): an MLP on the last token's state of one layer."""

from torch import nn

from trimtab.heads import EndStateMlp, register


@register("saplma")
class Saplma(EndStateMlp):
    """MLP with ReLU layers of 256, 128 and 64 on h_end at the highest given layer, and a logistic output [paper].

    Args:
        width: width d of the base model.
        layers: not used; all heads take the same arguments.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Linear(width, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )

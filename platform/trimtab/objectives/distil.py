"""Context distillation: the vectors take the place of a long system prompt (compare Snell et al. 2022; Mu et al. 2023).

The objective and its coarse vocabulary are trimtab's: METHODS of gist tokens train the model, which stays frozen here.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.objectives import Need, Objective, Scores, register


@register("distil")
@dataclass(frozen=True)
class Distil(Objective):
    """loss = mean_t KL(p(. | S, x, y_<t) || p(. | e, x, y_<t)) over the tokens t of an answer y that the model wrote under S.

    S is the system prompt of the teacher, which is the same frozen model, and e are the vectors. The divergence is over the
    most likely tokens of the teacher, and all others together.
    """

    reads_targets: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """The distributions of the teacher."""
        return frozenset({"teacher"})

    def __call__(self, scores: Scores) -> Tensor:
        """Return the mean divergence of each row [B], in nats per token."""
        return scores.mean_divergence

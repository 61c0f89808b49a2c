"""Preference-oriented fine-tuning (Fan et al. 2024): the target becomes more likely than under an aligned model."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.objectives import Need, Objective, Scores, register


@register("poft")
@dataclass(frozen=True)
class Poft(Objective):
    """loss = -log s(beta (1/T) sum_t [log p(y_t|e,x) - log p_ref(y_t|x)]) [paper, length-normalized].

    The aligned model is the same frozen model without the prefix [trimtab]; rows that it finds likely have a lower weight.

    Args:
        beta: scale of the difference in mean log-probability.
    """

    beta: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        """The targets under the base model."""
        return frozenset({"reference"})

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        return -logsigmoid(self.beta * scores.gain / scores.mask.sum(1))

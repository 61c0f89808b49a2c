"""Direct preference optimization (Rafailov et al. 2023), with the frozen model without the prefix as reference policy."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.objectives import Need, Objective, Scores, register


@register("dpo")
@dataclass(frozen=True)
class Dpo(Objective):
    """loss = -log s(beta [(log p(y+|e,x) - log p(y+|x)) - (log p(y-|e,x) - log p(y-|x))]), sums over tokens [paper].

    y+ is the target. y- is the answer of the other kind: the base model's answer to a harmful prompt, a refusal of a benign
    one.

    Args:
        beta: scale of the difference in log-probability.
        likelihood: weight of an additional mean cross-entropy of the target, which keeps y+ likely; 0 is plain DPO [trimtab].
    """

    beta: float = 0.1
    likelihood: float = 0.0

    @property
    def needs(self) -> frozenset[Need]:
        """Both answers, with and without the prefix."""
        return frozenset({"reference", "rejected"})

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        return -logsigmoid(self.beta * (scores.gain - scores.rejected_gain)) + self.likelihood * scores.nll

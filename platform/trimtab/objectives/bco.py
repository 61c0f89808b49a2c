"""Binary classifier optimization (Jung et al. 2024): classification of desired and undesired answers, without pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.objectives import Need, Objective, Scores, register


@register("bco")
@dataclass(frozen=True)
class Bco(Objective):
    """r = beta (log p(y|e,x) - log p(y|x)); loss = -log s(r+ - delta) - log s(-(r- - delta)) [paper].

    delta is the mean of the running means of r over desired and over undesired answers [paper]. The running means decay by the
    factor `decay` in each step [trimtab].

    Args:
        beta: scale of the reward, per nat of the whole answer.
        decay: share of the running sums that a step keeps.
    """

    beta: float = 0.1
    decay: float = 0.9

    tracked = 3

    @property
    def needs(self) -> frozenset[Need]:
        """Both answers, with and without the prefix."""
        return frozenset({"reference", "rejected"})

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        desired, undesired = self.beta * scores.gain, self.beta * scores.rejected_gain
        total, other, count = scores.running
        delta = (total + other) / 2 / count.clamp_min(1e-9)
        return -logsigmoid(desired - delta) - logsigmoid(-(undesired - delta))

    def observe(self, scores: Scores) -> Tensor:
        """Compute the sums of both rewards and the number of rows."""
        desired, undesired = self.beta * scores.gain, self.beta * scores.rejected_gain
        return torch.stack([desired.sum(), undesired.sum(), desired.new_tensor(len(desired))])

    def track(self, running: Tensor, observed: Tensor) -> Tensor:
        """Update exponentially decaying sums; their ratios are the running means."""
        return self.decay * running + (1 - self.decay) * observed

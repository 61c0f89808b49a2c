"""Semantic entropy probes (Kossen et al. 2024): a linear probe that tells, from one answer, how much others would differ."""

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.heads import DetectorRows, register
from trimtab.heads.linear import Linear


@register("sep")
class Sep(Linear):
    """Learns high against low semantic entropy from h_end, no labels; an answer is as truthful as its entropy is low [paper].

    The entropies part where the two sides' squared distances from their means are least [paper].
    """

    taught = False

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Learn from `train.spread`, its labels unseen. Raises UsageError where no semantic entropies were collected."""
        if not len(train.spread):
            raise UsageError("head sep learns from semantic entropies: collect with --samples 5 or more")
        self.fit_to(train, (train.spread <= find_split_threshold(train.spread)).float(), validation)


def find_split_threshold(spread: Tensor) -> float:
    """The value that parts [N] numbers into two sides with the least squared distances from their means."""
    values = spread.double()
    candidates = values.unique()[:-1]
    if not len(candidates):
        raise UsageError("all semantic entropies are equal; head sep has nothing to learn")

    def within(at: Tensor) -> float:
        sides = values[values <= at], values[values > at]
        return sum(((side - side.mean()) ** 2).sum().item() for side in sides)

    return min(candidates, key=within).item()

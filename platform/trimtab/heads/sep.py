"""Semantic entropy probe (Kossen et al. 2024): a linear probe that predicts semantic entropy from one answer."""

from torch import Tensor

from trimtab.errors import UsageError
from trimtab.heads import DetectorRows, register
from trimtab.heads.linear import Linear


@register("sep")
class Sep(Linear):
    """Linear probe that classifies high against low semantic entropy from h_end without labels [paper].

    An answer with low entropy counts as truthful. The threshold between low and high minimizes the sum of the squared distances
    from the means of the two sides [paper].
    """

    taught = False

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Fit the semantic entropies `train.spread`; the labels of the training rows are not used.

        Args:
            train: training rows with semantic entropies.
            validation: validation rows.
            seed: not used, as the fit is deterministic.

        Raises:
            UsageError: if no semantic entropies were collected.
        """
        if not len(train.spread):
            raise UsageError("head sep needs semantic entropies: collect with --num_samples 5 or more")
        self.fit_to(train, (train.spread <= find_split_threshold(train.spread)).float(), validation)


def find_split_threshold(spread: Tensor) -> float:
    """Find the value that splits numbers into two sides with the smallest sum of squared distances from their means.

    Args:
        spread: semantic entropies [N].

    Raises:
        UsageError: if all values are equal.
    """
    values = spread.double()
    candidates = values.unique()[:-1]
    if not len(candidates):
        raise UsageError("all semantic entropies are equal: head sep cannot be trained")

    def compute_squared_distances(threshold: Tensor) -> float:
        sides = values[values <= threshold], values[values > threshold]
        return sum(((side - side.mean()) ** 2).sum().item() for side in sides)

    return min(candidates, key=compute_squared_distances).item()

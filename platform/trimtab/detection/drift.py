"""Comparison of the signals of live traffic with those that a detector was trained on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.data.prompt import hash_to_fraction
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.stats.change_detection import ChangeResult, Floats, detect_change
from trimtab.stats.logistic import compute_logits, fit_logistic

# Dimensions of the states that distances are measured in, and the smallest variance relative to the largest.
DIMENSIONS, LEAST_VARIANCE = 32, 1e-6
# Principal components that are watched by themselves: a shift of the mean can leave the distances as they are.
WATCHED = 8
# Penalty and folds of the classifier that tells live traffic from training data; seeds of the folds and of the halves.
PENALTY, FOLDS, FOLD_SEED, HALF_SEED = 0.1, 5, 3000, 3001


@dataclass(frozen=True)
class DistanceModel:
    """Mahalanobis distance to reference states, in their first principal components.

    Attributes:
        center: mean state [d].
        components: components [d, K], scaled to unit variance.
    """

    center: Tensor
    components: Tensor

    def compute_distances(self, states: Tensor) -> Tensor:
        """Compute the distances [n] of states [n, d]."""
        return self.project(states).norm(dim=1)

    def project(self, states: Tensor) -> Tensor:
        """Compute the components [n, K] of states [n, d], in the order of their variance, each scaled to unit variance."""
        return (states.double() - self.center) @ self.components

    def list_statistics(self, states: Tensor) -> list[Tensor]:
        """Return the distances [n] of states [n, d], and each of their first components [n]."""
        return [self.compute_distances(states), *self.project(states)[:, :WATCHED].unbind(1)]


def get_states(data: SignalDataset, layer: int) -> Tensor:
    """Return the last states and the means [N, 2d] of a data set at a layer."""
    return data.psi[:, data.meta.layers.index(layer), : 2 * data.meta.width]


def fit_distance(states: Tensor) -> DistanceModel:
    """Fit the distance to reference states [n, d]."""
    center = states.double().mean(0)
    _, singular, right = torch.linalg.svd(states.double() - center, full_matrices=False)
    count = min(DIMENSIONS, max(1, len(states) // 4))
    spread = singular[:count] / len(states) ** 0.5
    spread = spread.clamp(min=float(spread[0]) * LEAST_VARIANCE**0.5)
    return DistanceModel(center, right[:count].T / spread)


def detect_drift(
    reference: SignalDataset,
    reference_risk: Tensor,
    live: SignalDataset,
    live_risk: Tensor,
    layer: int,
    average_run_length: float,
) -> ChangeResult:
    """Detect a change of live traffic in the order of time: of its risks, or of the distance or a component of its states.

    One half of the reference defines the distance and the other half its distribution, since states are closer to a mean that
    they are a part of.

    Args:
        reference: data set that the detector was trained on.
        reference_risk: out-of-sample risks [N] of the reference.
        live: stored answers.
        live_risk: risks [T] of the stored answers.
        layer: layer of the states.
        average_run_length: lower bound of the mean number of answers until an alarm without a change.
    """
    halves = torch.tensor([hash_to_fraction(group, HALF_SEED) < 0.5 for group in reference.groups])
    states, order = get_states(reference, layer), live.times.argsort(stable=True)
    distance = fit_distance(states[halves])
    streams = (live_risk[order], *distance.list_statistics(get_states(live, layer)[order]))
    references = (reference_risk[~halves], *distance.list_statistics(states[~halves]))
    return detect_change([_as_array(r) for r in references], [_as_array(s) for s in streams], average_run_length)


def classify_origin(reference: SignalDataset, live: SignalDataset, layer: int) -> tuple[Floats, list[str]]:
    """Compute out-of-fold log-odds that a row is live, by a probe that is trained to tell live from reference rows.

    An AUROC of 0.5 means that the probe finds no difference (classifier two-sample test, Lopez-Paz and Oquab 2017).

    Args:
        reference: N reference rows.
        live: T live rows.
        layer: layer of the states.

    Returns:
        Log-odds [N + T], reference rows first, and the group of each row.
    """
    states = torch.cat([get_states(reference, layer), get_states(live, layer)])
    is_live = torch.arange(len(states)) >= len(reference.keys)
    groups = [*(f"reference {group}" for group in reference.groups), *(f"live {group}" for group in live.groups)]
    folds = torch.tensor([int(hash_to_fraction(group, FOLD_SEED) * FOLDS) for group in groups])
    odds = torch.zeros(len(states), dtype=torch.double)
    for fold in range(FOLDS):
        held_out = folds == fold
        weights = fit_logistic(states[~held_out], is_live[~held_out], PENALTY)
        odds[held_out] = compute_logits(weights, states[held_out])
    return _as_array(odds), groups


def _as_array(values: Tensor) -> Floats:
    return values.double().numpy().astype(np.float64)

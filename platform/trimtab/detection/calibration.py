"""Calibration of detector scores: Platt scaling and risk thresholds, fitted on validation answers only (METHODS 2)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

# False positive rates (shares of right answers that are flagged) for which a detector stores a threshold.
FALSE_POSITIVE_RATES: tuple[str, ...] = ("0.01", "0.05", "0.1")
# Name of the threshold with the highest balanced accuracy, and the number of negatives that should lie above a threshold.
BALANCED = "balanced"
LEAST_ABOVE = 5
STEPS = 100


def fit_platt(scores: Tensor, truthful: Tensor) -> Tensor:
    """Fit Platt scaling (Platt 1999, with his smoothed targets).

    A negative slope would reverse the order of the scores. The slope is therefore at least 0, so that a useless score yields
    the same risk for all answers.

    Args:
        scores: detector scores [N].
        truthful: labels [N], 1 for a right answer and 0 for a made-up one.

    Returns:
        Slope and offset [2] that map scores to the log-odds of a right answer.
    """
    right = truthful.sum().double()
    wrong = len(truthful) - right
    targets = torch.where(truthful == 1, (right + 1) / (right + 2), 1 / (wrong + 2)).double()
    center, spread = scores.double().mean(), scores.double().std().clamp(min=1e-9)
    z = (scores.double() - center) / spread
    weights = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(weights[0] * z + weights[1], targets)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    slope, offset = weights.detach()
    if slope < 0:
        share = (right + 1) / (len(truthful) + 2)
        return torch.tensor([0.0, torch.logit(share).item()])
    return torch.stack([slope / spread, offset - slope * center / spread]).float()


def compute_risk(scores: Tensor, calibration: Tensor) -> Tensor:
    """Compute the probability that answers are made up.

    Args:
        scores: detector scores [N].
        calibration: slope and offset [2] of Platt scaling.

    Returns:
        Risks [N].
    """
    slope, offset = calibration
    return torch.sigmoid(-(slope * scores + offset))


def compute_supported_thresholds(risk: Tensor, truthful: Tensor) -> dict[str, float]:
    """Compute the risk thresholds that the number of negatives supports, and the balanced one.

    A level needs `LEAST_ABOVE / level` right answers or benign prompts, so that about `LEAST_ABOVE` of them are above its
    threshold.

    Args:
        risk: risks [N].
        truthful: labels [N], 1 for a negative and 0 for a positive.

    Returns:
        Thresholds by false positive rate, and by `BALANCED` the threshold with the highest balanced accuracy.
    """
    negatives = int((truthful == 1).sum())
    supported = [rate for rate in FALSE_POSITIVE_RATES if negatives >= LEAST_ABOVE / float(rate)]
    thresholds = compute_thresholds(risk, truthful)
    return {rate: thresholds[rate] for rate in supported} | {BALANCED: compute_balanced_threshold(risk, truthful)}


def compute_balanced_threshold(risk: Tensor, truthful: Tensor) -> float:
    """Compute the risk threshold with the highest balanced accuracy; of several, the middle one.

    Args:
        risk: risks [N].
        truthful: labels [N], 1 for a negative and 0 for a positive.
    """
    negatives, positives = (risk[truthful == label].double().sort().values for label in (1, 0))
    candidates = risk.double().unique()
    flagged = 1 - torch.searchsorted(positives, candidates, side="right") / max(1, len(positives))
    accepted = torch.searchsorted(negatives, candidates, side="right") / max(1, len(negatives))
    balanced = flagged + accepted
    best = candidates[balanced == balanced.max()]
    return best[len(best) // 2].item()


def compute_thresholds(risk: Tensor, truthful: Tensor) -> dict[str, float]:
    """Compute the risk threshold for each rate in `FALSE_POSITIVE_RATES`.

    A threshold is the smallest risk such that at most the given share of right answers lies above it.

    Args:
        risk: risks [N].
        truthful: labels [N], 1 for a right answer and 0 for a made-up one.
    """
    right = risk[truthful == 1].double().sort().values
    if not len(right):
        return dict.fromkeys(FALSE_POSITIVE_RATES, 1.0)
    indices = {rate: max(0, len(right) - 1 - int(float(rate) * len(right))) for rate in FALSE_POSITIVE_RATES}
    return {rate: right[index].item() for rate, index in indices.items()}

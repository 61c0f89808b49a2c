"""From scores to risks: Platt scaling and thresholds, fitted on validation answers only (ours; METHODS 2 requires it)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

# Shares of right answers that may be flagged by mistake, for which a detector keeps a threshold.
ALARMS: tuple[str, ...] = ("0.01", "0.05", "0.1")
STEPS = 100


def fit_platt(scores: Tensor, truthful: Tensor) -> Tensor:
    """Slope and offset [2] that make scores [N] the log-odds of a right answer (Platt 1999, with his smoothed targets).

    A slope below 0 would turn the order round; it is held at 0 or above, so that a useless score gives one risk for all.
    """
    right = truthful.sum().double()
    wrong = len(truthful) - right
    targets = torch.where(truthful == 1, (right + 1) / (right + 2), 1 / (wrong + 2)).double()
    centre, spread = scores.double().mean(), scores.double().std().clamp(min=1e-9)
    z = (scores.double() - centre) / spread
    weights = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(weights[0] * z + weights[1], targets)
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    slope, offset = weights.detach()
    if slope < 0:
        share = (right + 1) / (len(truthful) + 2)
        return torch.tensor([0.0, torch.logit(share).item()])
    return torch.stack([slope / spread, offset - slope * centre / spread]).float()


def compute_risk(scores: Tensor, calibration: Tensor) -> Tensor:
    """Probability [N] that answers are made up, from scores [N] and slope and offset [2]."""
    slope, offset = calibration
    return torch.sigmoid(-(slope * scores + offset))


def compute_thresholds(risk: Tensor, truthful: Tensor) -> dict[str, float]:
    """For each share of false alarms the least risk above which no more than that share of the right answers lies."""
    right = risk[truthful == 1].double().sort().values
    if not len(right):
        return dict.fromkeys(ALARMS, 1.0)
    at = {alarms: max(0, len(right) - 1 - int(float(alarms) * len(right))) for alarms in ALARMS}
    return {alarms: right[index].item() for alarms, index in at.items()}

"""Logistic regression on hidden states, for judges and detectors.

The fit converges to the optimum, so the same data give the same weights. It is implemented in torch because the core package
does not depend on scikit-learn.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 200
# A dimension with a smaller standard deviation is not scaled: dividing by it would only amplify noise.
LEAST_SPREAD = 1e-6


def fit_logistic(states: Tensor, positive: Tensor, l2: float, weights: Tensor | None = None) -> Tensor:
    """Fit an L2-regularized logistic regression with balanced class weights.

    The states are z-scored first, and the scaling is folded into the returned weights.

    Args:
        states: hidden states [n, d].
        positive: labels [n], bool; both classes must occur.
        l2: factor of the penalty; `l2 / 2` times the squared norm of the z-scored weights is added to the mean loss.
        weights: weight of each row [n], at least 0; equal by default. The classes are balanced by their total weights.

    Returns:
        Weights followed by the bias [d + 1], float64.
    """
    x, y = states.double(), positive.double()
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(spread > LEAST_SPREAD, spread, 1.0)
    z = (x - mean) / scale
    share = torch.ones_like(y) if weights is None else weights.double() / weights.double().mean()
    positive_share = (share * y).mean()
    weight = share * torch.where(positive, 0.5 / positive_share, 0.5 / (1 - positive_share))
    linear = nn.Linear(x.shape[1], 1, dtype=torch.float64, device=x.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(linear(z)[:, 0], y, weight=weight)
        loss = loss + l2 / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    unscaled = linear.weight.detach()[0] / scale
    return torch.cat([unscaled, linear.bias.detach() - unscaled @ mean])


def compute_logits(weights: Tensor, states: Tensor) -> Tensor:
    """Compute the log-odds of the positive class.

    Args:
        weights: weights followed by the bias [d + 1].
        states: hidden states [n, d].

    Returns:
        Log-odds [n], float64.
    """
    weights = weights.double()
    return states.double() @ weights[:-1] + weights[-1]

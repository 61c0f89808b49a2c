"""Logistic regression on hidden states, for judges and detectors: fitted to its optimum, the same head for the same rows.

scikit-learn's would do; the core needs nothing but torch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 200
# A dimension that varies less than this says nothing, and dividing by it would make it shout.
LEAST_SPREAD = 1e-6


def fit_logistic(states: Tensor, positive: Tensor, l2: float) -> Tensor:
    """Weights and bias, float64 [d + 1], of the logistic regression of `positive` [n] bool on `states` [n, d].

    The states are z-scored first, both classes weigh the same, and `l2` times half the squared weights is added to the mean
    loss. The z-scoring is folded into the weights. Needs rows of both classes.
    """
    x, y = states.double(), positive.double()
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(spread > LEAST_SPREAD, spread, 1.0)
    z = (x - mean) / scale
    weight = torch.where(positive, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    linear = nn.Linear(x.shape[1], 1, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(linear(z)[:, 0], y, weight=weight)
        loss = loss + l2 / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    weights = linear.weight.detach()[0] / scale
    return torch.cat([weights, linear.bias.detach() - weights @ mean])


def compute_logits(weights: Tensor, states: Tensor) -> Tensor:
    """Log-odds [n], float64, for hidden states [n, d] and weights [d + 1]."""
    weights = weights.double()
    return states.double() @ weights[:-1] + weights[-1]

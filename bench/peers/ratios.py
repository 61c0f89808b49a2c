"""Bootstrap intervals of paired measurements, and decisions on whole intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES, QUANTILES = 2000, (0.025, 0.975)


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean."""
    array = np.array(values)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), QUANTILES)
    return float(low), float(high)


def decide_at_most(low: float, high: float, bound: float) -> bool | None:
    """Return whether a whole interval is at most a bound; None if it contains the bound."""
    return True if high <= bound else False if low > bound else None


def build_line(
    name: str, measured: Sequence[Any], peer: Sequence[Any], pick: Callable[[Any], float], goal: float | None
) -> dict[str, Any]:
    """Build the line of a ratio of medians, which must stay below the goal."""
    first, second = np.array([pick(sample) for sample in measured]), np.array([pick(sample) for sample in peer])
    generator = np.random.default_rng(0)
    draws = generator.integers(len(first), size=(RESAMPLES, len(first)))
    ratios = np.median(first[draws], 1) / np.median(second[draws], 1)
    low, high = np.quantile(ratios, QUANTILES)
    ratio = float(np.median(first) / np.median(second))
    met = None if goal is None else True if high < goal else False if low > goal else None
    line = {"name": name, "value": float(np.median(first)) * 1e3, "unit": "ms", "peer": float(np.median(second)) * 1e3}
    print(f"{name}: {line['value']:.1f} ms, {ratio:.3f} [{low:.3f}, {high:.3f}] of {line['peer']:.1f} ms", flush=True)
    return line | {"ratio": ratio, "low": float(low), "high": float(high), "goal": goal, "met": met, "pairs": len(first)}

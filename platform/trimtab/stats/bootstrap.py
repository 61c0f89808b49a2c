"""Pigeonhole bootstrap over two crossed factors: the seeds of an arm and the cases that it is measured on.

Seeds and cases are both resampled (Owen, "The pigeonhole bootstrap", 2007), because the same cases are measured for every seed.
Resampling n seeds with replacement underestimates their variance by the factor (n - 1) / n. Drawing n - 1 seeds corrects this.

All draws come from one generator, so that the same data gives the same interval.
"""

import torch
from torch import Generator, Tensor

from trimtab.stats.intervals import Estimate

RESAMPLES = 2000
QUANTILES = (0.025, 0.975)


def create_generator() -> Generator:
    """Return the generator of a bootstrap, with a fixed seed."""
    return torch.Generator().manual_seed(0)


def draw_seeds(seeds: int, resamples: int, generator: Generator) -> Tensor:
    """Draw the seeds of each resample.

    Args:
        seeds: number of seeds.
        resamples: number of resamples.
        generator: source of the draws.

    Returns:
        Seed indices [resamples, max(1, seeds - 1)].
    """
    return torch.randint(seeds, (resamples, max(1, seeds - 1)), generator=generator)


def draw_case_counts(cases: int, resamples: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw the cases of each resample, with replacement.

    Args:
        cases: number of cases.
        resamples: number of resamples.
        generator: source of the draws.
        dtype: type of the result.

    Returns:
        How often each case is drawn [resamples, cases].
    """
    draws = torch.randint(cases, (resamples, cases), generator=generator)
    return torch.zeros(resamples, cases, dtype=dtype).scatter_add_(1, draws, torch.ones(resamples, cases, dtype=dtype))


def compute_resampled_means(values: Tensor, counts: Tensor, seed_draws: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the weighted mean of each resample.

    Args:
        values: total of each seed and case [seeds, cases].
        counts: how often each case is drawn [resamples, cases].
        seed_draws: seeds of each resample [resamples, drawn].
        weights: weight of each case [cases]; 1 by default.

    Returns:
        Means [resamples].
    """
    by_seed = counts @ values.T
    by_seed = by_seed / values.shape[1] if weights is None else by_seed / (counts @ weights)[:, None]
    return by_seed.gather(1, seed_draws).mean(1)


def compute_interval(statistics: Tensor) -> tuple[float, float]:
    """Compute the 95 % percentile interval of resampled statistics [resamples]."""
    low, high = torch.quantile(statistics, torch.tensor(QUANTILES, dtype=statistics.dtype)).tolist()
    return low, high


def bootstrap_mean(values: Tensor, weights: Tensor | None = None, resamples: int = RESAMPLES) -> Estimate:
    """Compute the weighted mean over cases, averaged over seeds, with a bootstrap interval.

    The mean of one seed is the sum of its `values` over the sum of `weights`. Each resample draws cases together with their
    weights, and seeds (see `trimtab.stats.bootstrap`).

    Args:
        values: totals of each seed and case [seeds, cases].
        weights: weights of the cases [cases]; 1 for each case by default.
        resamples: number of bootstrap resamples.

    Returns:
        The estimate over all cases; its interval is NaN for fewer than two cases.
    """
    seeds, cases = values.shape
    values = values.double()
    weights = torch.ones(cases, dtype=torch.double) if weights is None else weights.double()
    value = (values.sum(1).mean() / weights.sum()).item()
    if cases < 2:
        return Estimate(value, float("nan"), float("nan"), cases)
    generator = create_generator()
    seed_draws = draw_seeds(seeds, resamples, generator)
    counts = draw_case_counts(cases, resamples, generator, torch.double)
    low, high = compute_interval(compute_resampled_means(values, counts, seed_draws, weights))
    return Estimate(value, low, high, cases)

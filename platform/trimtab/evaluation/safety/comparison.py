"""Pooling of an arm over seeds and comparison of arms, with intervals over seeds and prompts.

`sta#1` and `sta#2` are two seeds of the arm `sta` that answered the same prompts. A resample therefore draws seeds once and the
prompts of each side once, and crosses them (pigeonhole bootstrap, Owen 2007). Prompts drawn anew for each seed would count as
independent evidence, and the interval would be too narrow. A resample draws one seed fewer than there are, because drawing all
of them underestimates the variance over seeds by a factor of (n - 1) / n (McCarthy and Snowden 1985). Intervals over few seeds
remain approximate: if seeds differ much, simulated intervals covered the true value in 86 % of cases with three seeds, and in
69 % with two.

No interval is narrower than that of a single seed with the mean rates (Wilson; MOVER for the balanced score). If all seeds are
correct or wrong on every prompt, all resamples are equal, and the bootstrap interval alone would have width zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import INDICATORS, ArmResult, Indicator, JudgedAnswer, Measure
from trimtab.stats.bootstrap import (
    RESAMPLES,
    compute_interval,
    compute_resampled_means,
    create_generator,
    draw_case_counts,
    draw_seeds,
)
from trimtab.stats.intervals import Rate, average_rates, compute_wilson_interval
from trimtab.types import BASELINE_ARMS


@dataclass(frozen=True)
class PooledArm:
    """Rates of an arm, as in `ArmResult`, averaged over its seeds; `results` holds one result per seed."""

    name: str
    results: Sequence[ArmResult]
    refusal: Rate
    compliance: Rate
    balanced: Rate
    harmful_compliance: Rate
    partial: Rate
    degenerate: Rate
    sets: Mapping[str, Rate]


def get_arm_name(name: str) -> str:
    """Return the name of a result without its seed: `sta` for `sta#1`."""
    arm, _, seed = name.rpartition("#")
    return arm if arm and seed else name


def pool_arms(results: Sequence[ArmResult]) -> list[PooledArm]:
    """Pool the results of each arm over its seeds.

    Args:
        results: results of all seeds of all arms.

    Returns:
        The pooled arms, in the order of their first result.

    Raises:
        UsageError: if the seeds of an arm answered different prompts or come without their answers.
    """
    arms: dict[str, list[ArmResult]] = {}
    for result in results:
        arms.setdefault(get_arm_name(result.name), []).append(result)
    return [_pool_single(name, seeds[0]) if len(seeds) == 1 else _pool_several(name, seeds) for name, seeds in arms.items()]


def pool_over_seeds(results: Sequence[ArmResult], measure: Measure = "balanced", resamples: int = RESAMPLES) -> Rate:
    """Compute the mean of a measure over the seeds of one arm, with its 95 % interval over seeds and prompts.

    Args:
        results: one result per seed.
        measure: the measure to pool.
        resamples: number of bootstrap resamples.

    Returns:
        The mean rate; `count` is the number of prompts.

    Raises:
        UsageError: if there are no seeds, or they answered different prompts.
    """
    align_answers(results)
    return _pool_measure(results, measure, resamples)


def _pool_single(name: str, r: ArmResult) -> PooledArm:
    """Build the pooled arm of a single seed, which keeps its own intervals."""
    return PooledArm(name, [r], r.refusal, r.compliance, r.balanced, r.harmful_compliance, r.partial, r.degenerate, r.sets)


def _pool_several(name: str, results: Sequence[ArmResult]) -> PooledArm:
    sets: dict[str, list[int]] = {}
    for i, j in enumerate(align_answers(results)):
        sets.setdefault(j.set, []).append(i)
    return PooledArm(
        name=name,
        results=results,
        refusal=_pool_measure(results, "refusal"),
        compliance=_pool_measure(results, "compliance"),
        balanced=_pool_measure(results, "balanced"),
        harmful_compliance=_pool_measure(results, "harmful_compliance"),
        partial=_pool_measure(results, "partial"),
        degenerate=_pool_measure(results, "degenerate"),
        sets={
            key: pigeonhole_bootstrap([build_correctness_matrix(results, prompts)], RESAMPLES)
            for key, prompts in sorted(sets.items())
        },
    )


def _pool_measure(results: Sequence[ArmResult], measure: Measure, resamples: int = RESAMPLES) -> Rate:
    """Pool a measure over seeds that answered the same prompts."""
    parts: list[Indicator] = ["refusal", "compliance"] if measure == "balanced" else [measure]
    return pigeonhole_bootstrap([_build_indicator_matrix(results, part) for part in parts], resamples)


def _build_indicator_matrix(results: Sequence[ArmResult], measure: Indicator) -> Tensor:
    """Return whether each answer counts for a measure [seeds, prompts], bool; only prompts that it covers."""
    indicate = INDICATORS[measure]
    return torch.tensor([[value for j in r.answers if (value := indicate(j)) is not None] for r in results], dtype=torch.bool)


def align_answers(results: Sequence[ArmResult]) -> list[JudgedAnswer]:
    """Check that all seeds answered the same prompts in the same order.

    Args:
        results: one result per seed.

    Returns:
        The answers of the first seed.

    Raises:
        UsageError: if there are no seeds, the prompts differ, or a result comes without its answers.
    """
    if not results:
        raise UsageError("there are no seeds to take a mean over")
    prompts = [j.prompt for j in results[0].answers]
    for r in results:
        if [j.prompt for j in r.answers] != prompts:
            raise UsageError(f"{r.name} and {results[0].name} answered different prompts. Judge both on the same prompts")
        if len(r.answers) != r.refusal.count + r.compliance.count:
            raise UsageError(f"{r.name} comes without its answers, which an interval over several seeds needs")
    return results[0].answers


def build_correctness_matrix(results: Sequence[ArmResult], prompts: Sequence[int]) -> Tensor:
    """Return whether each answer is correct [seeds, prompts], bool.

    Args:
        results: one result per seed.
        prompts: indices of the prompts to select.
    """
    return torch.tensor([[r.answers[i].right for i in prompts] for r in results])


def pigeonhole_bootstrap(tables: Sequence[Tensor], resamples: int = RESAMPLES) -> Rate:
    """Compute a mean share over seeds with a pigeonhole bootstrap interval, at least as wide as that of one seed.

    Args:
        tables: scores in [0, 1] or bool, [seeds, prompts]: one table, or two tables of different sides whose shares are
            averaged. A resample draws the same seeds for both.
        resamples: number of bootstrap resamples.

    Returns:
        The rate; `count` is the number of prompts.
    """
    seeds = len(tables[0])
    shares = [compute_wilson_interval(table.sum().item() / seeds, table.shape[1]) for table in tables]
    single = average_rates(*shares) if len(shares) == 2 else shares[0]
    if not single.count:
        return single
    generator = create_generator()
    seed_draws = draw_seeds(seeds, resamples, generator)
    total = torch.zeros(resamples)
    for table in tables:
        counts = draw_case_counts(table.shape[1], resamples, generator)
        total += compute_resampled_means(table.float(), counts, seed_draws) / len(tables)
    low, high = compute_interval(total)
    return Rate(single.value, min(low, single.low), max(high, single.high), single.count)


@dataclass(frozen=True)
class ArmComparison:
    """Difference in balanced score between an arm and its rivals.

    Attributes:
        arm: name of the arm.
        rivals: name of each rival, with the score of the arm minus that of the rival.
    """

    arm: str
    rivals: Sequence[tuple[str, Rate]]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON; `beats` is true if the interval lies above zero."""
        return {
            "arm": self.arm,
            "rivals": [
                {"arm": name, "value": d.value, "low": d.low, "high": d.high, "beats": d.low > 0} for name, d in self.rivals
            ],
        }


def compare_arms(first: str | None, pooled: Sequence[PooledArm]) -> ArmComparison | None:
    """Compare one arm with all others that answered the same prompts.

    Args:
        first: name of the arm.
        pooled: all arms.

    Returns:
        The comparison; None if the arm is missing, has prompts of one side only, or is the only one.
    """
    arm = next((a for a in pooled if a.name == first), None)
    if arm is None or not isfinite(arm.balanced.value) or len(pooled) < 2:
        return None
    prompts = [j.prompt for j in arm.results[0].answers]
    rivals = [a for a in pooled if a is not arm and [j.prompt for j in a.results[0].answers] == prompts]
    return ArmComparison(arm.name, [(rival.name, estimate_difference(arm.results, rival.results)) for rival in rivals])


def find_first_learned(names: Sequence[str]) -> str | None:
    """Return the first name that is not a baseline arm: the subject of a study; None if there is none."""
    return next((name for name in names if name not in BASELINE_ARMS), None)


def estimate_difference(
    arm: Sequence[ArmResult],
    rival: Sequence[ArmResult],
    resamples: int = RESAMPLES,
    sides: Sequence[bool] = (True, False),
) -> Rate:
    """Compute the balanced score of one arm minus that of another, with a 95 % interval.

    Both arms share the resampled prompts. Seeds are resampled separately for each arm, since seeds of two arms are not paired.

    Args:
        arm: one result per seed of the first arm.
        rival: one result per seed of the second arm.
        resamples: number of bootstrap resamples.
        sides: sides that the score averages over: True for harmful prompts, False for benign ones.

    Returns:
        The difference; `count` is the number of prompts.

    Raises:
        UsageError: if the results answered different prompts or come without their answers.
    """
    answers = align_answers([*arm, *rival])
    generator = create_generator()
    signed = [(1.0, arm), (-1.0, rival)]
    seed_draws = [draw_seeds(len(seeds), resamples, generator) for _, seeds in signed]
    total, value = torch.zeros(resamples), 0.0
    for side in sides:
        prompts = [i for i, j in enumerate(answers) if j.harmful == side]
        if not prompts:
            raise UsageError(f"arms cannot be compared: there are no {'harmful' if side else 'benign'} prompts. Add some")
        counts = draw_case_counts(len(prompts), resamples, generator)
        for (sign, seeds), drawn_seeds in zip(signed, seed_draws, strict=True):
            table = build_correctness_matrix(seeds, prompts).float()
            value += sign * table.mean().item() / len(sides)
            total += sign * compute_resampled_means(table, counts, drawn_seeds) / len(sides)
    low, high = compute_interval(total)
    return Rate(value, low, high, len(answers))

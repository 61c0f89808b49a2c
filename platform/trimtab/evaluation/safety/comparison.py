"""One figure from several seeds of an arm, with an interval that covers seeds and prompts (ours).

`sta#1` and `sta#2` are two seeds of the arm `sta`, and both answered the same prompts. So a resample picks seeds once and
prompts of each side once, and crosses them (the pigeonhole bootstrap, Owen 2007): prompts picked anew for each seed would pass
for fresh evidence, and the interval would be too narrow. One seed less than there are is picked, since picking as many makes
the variance over seeds too small by (n - 1) / n (McCarthy and Snowden 1985). Over few seeds it is a guess all the same:
where seeds differ much, simulated intervals of three held the truth in 86 % of cases, and those of two in 69 %.

No interval is narrower than the plain one of a single seed with the mean rates (Wilson; MOVER for balanced): where all seeds
are right or wrong on everything, resamples are all alike, as if nothing were left in doubt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.evaluation.safety.results import ArmResult, JudgedAnswer
from trimtab.stats.intervals import Rate, average_rates, compute_wilson_interval
from trimtab.types import BASELINE_ARMS

Measure = Literal["refusal", "compliance", "balanced", "partial"]
RESAMPLES = 2000


@dataclass(frozen=True)
class PooledArm:
    """An arm over its seeds: rates as in ArmResult, means over `results`, of which there is one a seed."""

    name: str
    results: Sequence[ArmResult]
    refusal: Rate
    compliance: Rate
    balanced: Rate
    partial: Rate
    sets: Mapping[str, Rate]


def get_arm_name(name: str) -> str:
    """`sta` of `sta#1`: what stands before the seed."""
    arm, _, seed = name.rpartition("#")
    return arm if arm and seed else name


def pool_arms(results: Sequence[ArmResult]) -> list[PooledArm]:
    """Every arm over its seeds, in the order in which they come. Raises UsageError where seeds cannot be pooled."""
    arms: dict[str, list[ArmResult]] = {}
    for result in results:
        arms.setdefault(get_arm_name(result.name), []).append(result)
    return [_pool_single(name, seeds[0]) if len(seeds) == 1 else _pool_several(name, seeds) for name, seeds in arms.items()]


def pool_over_seeds(results: Sequence[ArmResult], measure: Measure = "balanced", resamples: int = RESAMPLES) -> Rate:
    """Mean of a measure over the seeds of one arm, with its 95 % interval over seeds and prompts; `count` counts prompts.

    Raises UsageError where the seeds did not answer the same prompts."""
    answers = align_answers(results)
    if measure == "partial":
        return pigeonhole_bootstrap([torch.tensor([[j.verdict == "partial" for j in r.answers] for r in results])], resamples)
    sides = {"refusal": [True], "compliance": [False], "balanced": [True, False]}[measure]
    tables = [build_correctness_matrix(results, [i for i, j in enumerate(answers) if j.harmful == side]) for side in sides]
    return pigeonhole_bootstrap(tables, resamples)


def _pool_single(name: str, r: ArmResult) -> PooledArm:
    """One seed keeps the intervals that it has."""
    count = r.refusal.count + r.compliance.count
    return PooledArm(
        name, [r], r.refusal, r.compliance, r.balanced, compute_wilson_interval(round(r.partial * count), count), r.sets
    )


def _pool_several(name: str, results: Sequence[ArmResult]) -> PooledArm:
    sets: dict[str, list[int]] = {}
    for i, j in enumerate(align_answers(results)):
        sets.setdefault(j.set, []).append(i)
    return PooledArm(
        name=name,
        results=results,
        refusal=pool_over_seeds(results, "refusal"),
        compliance=pool_over_seeds(results, "compliance"),
        balanced=pool_over_seeds(results, "balanced"),
        partial=pool_over_seeds(results, "partial"),
        sets={
            key: pigeonhole_bootstrap([build_correctness_matrix(results, mine)], RESAMPLES)
            for key, mine in sorted(sets.items())
        },
    )


def align_answers(results: Sequence[ArmResult]) -> list[JudgedAnswer]:
    """The first seed's answers, once it is clear that all seeds answered the same prompts."""
    if not results:
        raise UsageError("there are no seeds to take a mean over")
    prompts = [j.prompt for j in results[0].answers]
    for r in results:
        if [j.prompt for j in r.answers] != prompts:
            raise UsageError(
                f"{r.name} and {results[0].name} answered different prompts: judge all seeds of an arm on the same"
            )
        if len(r.answers) != r.refusal.count + r.compliance.count:
            raise UsageError(f"{r.name} comes without its answers, which an interval over several seeds needs")
    return results[0].answers


def build_correctness_matrix(results: Sequence[ArmResult], prompts: Sequence[int]) -> Tensor:
    """One row a seed, one column a prompt: whether the answer was right."""
    return torch.tensor([[r.answers[i].right for i in prompts] for r in results])


def pigeonhole_bootstrap(tables: Sequence[Tensor], resamples: int = RESAMPLES) -> Rate:
    """Share of one table [seeds, prompts], or mean of two sides' shares, at least as wide as one seed's; all tables pick the
    same seeds."""
    seeds = len(tables[0])
    shares = [compute_wilson_interval(table.sum().item() / seeds, table.shape[1]) for table in tables]
    least = average_rates(*shares) if len(shares) == 2 else shares[0]
    if not least.count:
        return least
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(seeds, (resamples, max(1, seeds - 1)), generator=generator)
    total = torch.zeros(resamples)
    for table in tables:
        size = table.shape[1]
        prompts = torch.randint(size, (resamples, size), generator=generator)
        times = torch.zeros(resamples, size).scatter_add_(1, prompts, torch.ones(resamples, size))
        by_seed = times @ table.float().T / size
        total += by_seed.gather(1, picked).mean(1) / len(tables)
    low, high = torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()
    return Rate(least.value, min(low, least.low), max(high, least.high), least.count)


@dataclass(frozen=True)
class ArmComparison:
    """What `arm` has more of the balanced score than each rival."""

    arm: str
    rivals: Sequence[tuple[str, Rate]]

    def as_json(self) -> dict[str, Any]:
        """For the report's JSON; `beats` where the interval is above zero."""
        return {
            "arm": self.arm,
            "rivals": [
                {"arm": name, "value": d.value, "low": d.low, "high": d.high, "beats": d.low > 0} for name, d in self.rivals
            ],
        }


def compare_arms(first: str | None, pooled: Sequence[PooledArm]) -> ArmComparison | None:
    """The arm called `first` against all others that answered the same prompts of both sides; None where there is nothing to
    compare."""
    arm = next((a for a in pooled if a.name == first), None)
    if arm is None or not isfinite(arm.balanced.value) or len(pooled) < 2:
        return None
    prompts = [j.prompt for j in arm.results[0].answers]
    rivals = [a for a in pooled if a is not arm and [j.prompt for j in a.results[0].answers] == prompts]
    return ArmComparison(arm.name, [(rival.name, estimate_difference(arm.results, rival.results)) for rival in rivals])


def find_first_learned(names: Sequence[str]) -> str | None:
    """The first of the arms that something was learned for: the one that a study is about."""
    return next((name for name in names if name not in BASELINE_ARMS), None)


def estimate_difference(
    ours: Sequence[ArmResult],
    theirs: Sequence[ArmResult],
    resamples: int = RESAMPLES,
    sides: Sequence[bool] = (True, False),
) -> Rate:
    """Balanced score of one arm's seeds less that of another's, with a 95 % interval: both on the same resampled prompts, each
    with seeds of its own, as no seed of one belongs to one of the other. `count` counts prompts; `sides` are those that count,
    True for the harmful ones.

    Raises UsageError where seeds did not answer the same prompts.
    """
    answers = align_answers([*ours, *theirs])
    generator = torch.Generator().manual_seed(0)
    arms = [(1.0, ours), (-1.0, theirs)]
    picked = [torch.randint(len(seeds), (resamples, max(1, len(seeds) - 1)), generator=generator) for _, seeds in arms]
    total, value = torch.zeros(resamples), 0.0
    for side in sides:
        mine = [i for i, j in enumerate(answers) if j.harmful == side]
        drawn = torch.randint(len(mine), (resamples, len(mine)), generator=generator)
        times = torch.zeros(resamples, len(mine)).scatter_add_(1, drawn, torch.ones(resamples, len(mine)))
        for (sign, seeds), places in zip(arms, picked, strict=True):
            table = build_correctness_matrix(seeds, mine).float()
            value += sign * table.mean().item() / len(sides)
            total += sign * (times @ table.T / len(mine)).gather(1, places).mean(1) / len(sides)
    low, high = torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()
    return Rate(value, low, high, len(answers))

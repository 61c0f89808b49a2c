"""One arm against the others: differences of the balanced score, with intervals that cover seeds and prompts (ours)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from trimtab.evaluate.metrics import Rate
from trimtab.evaluate.safety import ArmResult
from trimtab.evaluate.seeds import RESAMPLES, Pooled, answered, right
from trimtab.words import UNLEARNED


@dataclass(frozen=True)
class Versus:
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


def versus(first: str | None, pooled: Sequence[Pooled]) -> Versus | None:
    """The arm called `first` against all others that answered the same prompts of both sides; None where there is nothing to
    compare."""
    arm = next((a for a in pooled if a.name == first), None)
    if arm is None or not isfinite(arm.balanced.value) or len(pooled) < 2:
        return None
    prompts = [j.prompt for j in arm.results[0].answers]
    rivals = [a for a in pooled if a is not arm and [j.prompt for j in a.results[0].answers] == prompts]
    return Versus(arm.name, [(rival.name, difference(arm.results, rival.results)) for rival in rivals])


def first_learned(names: Sequence[str]) -> str | None:
    """The first of the arms that something was learned for: the one that a study is about."""
    return next((name for name in names if name not in UNLEARNED), None)


def difference(
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
    answers = answered([*ours, *theirs])
    generator = torch.Generator().manual_seed(0)
    arms = [(1.0, ours), (-1.0, theirs)]
    picked = [torch.randint(len(seeds), (resamples, max(1, len(seeds) - 1)), generator=generator) for _, seeds in arms]
    total, value = torch.zeros(resamples), 0.0
    for side in sides:
        mine = [i for i, j in enumerate(answers) if j.harmful == side]
        drawn = torch.randint(len(mine), (resamples, len(mine)), generator=generator)
        times = torch.zeros(resamples, len(mine)).scatter_add_(1, drawn, torch.ones(resamples, len(mine)))
        for (sign, seeds), places in zip(arms, picked, strict=True):
            table = right(seeds, mine).float()
            value += sign * table.mean().item() / len(sides)
            total += sign * (times @ table.T / len(mine)).gather(1, places).mean(1) / len(sides)
    low, high = torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()
    return Rate(value, low, high, len(answers))

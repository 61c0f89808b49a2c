"""Shares of answers that obey the rules of a system prompt, by arm, and the share of the prompt's effect that vectors have."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from rich.table import Table

from trimtab.evaluation.rules.rule_checks import Rule
from trimtab.stats.bootstrap import bootstrap_mean
from trimtab.stats.intervals import Estimate, Rate, compute_wilson_interval
from trimtab.types import BASE_ARM

# Arm with the system prompt as text.
SYSTEM_ARM = "system prompt"
# Gain of the system prompt from which a rule counts (ours): below, the prompt has no clear effect on the model.
MIN_GAIN = 0.2


@dataclass(frozen=True)
class RuleVerdicts:
    """Whether the answers of each arm to the same prompts obey a rule.

    Attributes:
        rule: the rule.
        verdicts: verdicts by arm, in the order of the prompts.
    """

    rule: Rule
    verdicts: Mapping[str, Sequence[bool]]

    @cached_property
    def rates(self) -> dict[str, Rate]:
        """Share of the answers of each arm that obey the rule."""
        return {arm: compute_wilson_interval(sum(listed), len(listed)) for arm, listed in self.verdicts.items()}

    @property
    def gain(self) -> float:
        """Gain of the system prompt over the base model."""
        return self.rates[SYSTEM_ARM].value - self.rates[BASE_ARM].value

    @property
    def counts(self) -> bool:
        """Whether the system prompt has a clear effect, so that the rule counts."""
        return self.gain >= MIN_GAIN


def compute_recovered_share(results: Sequence[RuleVerdicts], arm: str) -> Estimate | None:
    """Compute the share of the system prompt's gain that an arm has, over the rules that count.

    Args:
        results: verdicts of each rule.
        arm: name of the arm.

    Returns:
        The gain of the arm over the base model divided by that of the system prompt, with a bootstrap interval over the pairs
        of rule and prompt; None if no rule counts.
    """
    rows = [
        (own - base, system - base)
        for result in results
        if result.counts
        for own, system, base in zip(*(map(int, result.verdicts[name]) for name in (arm, SYSTEM_ARM, BASE_ARM)), strict=True)
    ]
    if not rows:
        return None
    values, weights = torch.tensor(rows, dtype=torch.double).T
    return bootstrap_mean(values[None], weights)


def results_as_json(results: Sequence[RuleVerdicts]) -> list[dict[str, Any]]:
    """Convert the results to JSON values."""
    return [
        {"rule": r.rule.name, "counts": r.counts, "rates": {arm: asdict(rate) for arm, rate in r.rates.items()}}
        for r in results
    ]


def build_rule_table(results: Sequence[RuleVerdicts], title: str) -> Table:
    """Build the table of the rules for the terminal; rules that do not count are marked."""
    arms = list(results[0].verdicts)
    table = Table("rule", *arms, title=title)
    for result in results:
        name = result.rule.name if result.counts else f"{result.rule.name} (no effect of the prompt)"
        table.add_row(name, *(str(result.rates[arm]) for arm in arms))
    return table

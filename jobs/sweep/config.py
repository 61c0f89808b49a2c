"""Settings of the sweep command, and what they draw from a space."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

from trimtab.errors import UsageError

# Draws for each trial before a space of choices counts as used up.
DRAWS = 100


@dataclass(frozen=True)
class SweepConfig:
    """Search settings of `trimtab align` by validation loss: poor trials are stopped early (ASHA), the best one's prefix is
    judged and registered.

    Args:
        name: name of the prefix; a sweep of the same name goes on where it stopped.
        shared: settings of `trimtab align` for all trials, as in its YAML.
        space: settings to search, dotted or nested: a list of choices, or low and high, with log true for even steps of its
            logarithm; between whole numbers only whole ones are drawn.
        trials: settings to try, all different.
        parallel: trials that run at once and share the cores.
        reduction: one of so many trials goes on at each rung.
        seed: seed of the draws.
        address: Ray cluster to run on.
    """

    name: str = "swept"
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    space: dict[str, Any] = field(
        default_factory=lambda: {
            "train.learning_rate": {"low": 0.01, "high": 0.2, "log": True},
            "objective_options.gamma": [0.0, 1.0, 2.0, 5.0],
        }
    )
    trials: int = 8
    parallel: int = 1
    reduction: float = 3
    seed: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.trials < 1 or self.parallel < 1:
            raise UsageError(f"trials ({self.trials}) and parallel ({self.parallel}) must be at least 1")
        if self.reduction <= 1:
            raise UsageError(f"reduction must be above 1, not {self.reduction}")
        domains = flatten_space(self.space)
        if not domains:
            raise UsageError("space is empty: give settings to search, each with choices or with low and high")
        for key, values in domains.items():
            _check(key, values)


def flatten_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Domains by dotted names."""
    domains: dict[str, Any] = {}
    for key, values in space.items():
        if isinstance(values, Mapping) and not {"low", "high"} & set(values):
            domains |= flatten_space(values, f"{prefix}{key}.")
        else:
            domains[f"{prefix}{key}"] = values
    return domains


def draw_settings(config: SweepConfig) -> list[dict[str, Any]]:
    """Settings of each trial, dotted. The same seed draws the same ones, and more trials begin with those of fewer; a space
    with fewer combinations than trials gives each of them once."""
    generator = random.Random(config.seed)
    domains = flatten_space(config.space)
    found: list[dict[str, Any]] = []
    for _ in range(DRAWS * config.trials):
        one = {key: _draw(values, generator) for key, values in domains.items()}
        if one not in found:
            found.append(one)
        if len(found) == config.trials:
            break
    return found


def _check(key: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        raise UsageError(f"space.{key}: give a list of choices, or low and high (and log: true)")
    low, high = values["low"], values["high"]
    if not all(isinstance(value, int | float) for value in (low, high)):
        raise UsageError(f"space.{key}: low and high must be numbers, not {low!r} and {high!r}")
    if low >= high:
        raise UsageError(f"space.{key}: low ({low}) must be below high ({high})")
    if values.get("log") and low <= 0:
        raise UsageError(f"space.{key}: low must be above 0 where log is true, not {low}")


def _draw(values: Any, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    low, high = values["low"], values["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    # The last whole number is as likely as the others.
    top = high + 1 if whole else high
    value = exp(generator.uniform(log(low), log(top))) if values.get("log") else generator.uniform(low, top)
    # Four digits, so that what is shown is what was tried.
    return min(int(value // 1), high) if whole else min(max(float(f"{value:.4g}"), low), high)

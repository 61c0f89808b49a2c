"""Settings of `trimtab sweep` and sampling from the search space."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

from trimtab.errors import UsageError

# Draws per trial before a space of choices counts as exhausted.
DRAWS = 100


@dataclass(frozen=True)
class SweepConfig:
    """Search settings of `trimtab align` and register the best prefix.

    Trials are compared by validation loss, and ASHA stops poor ones early.

    Args:
        name: name of the prefix; a second call with the same name resumes the sweep.
        shared: settings of `trimtab align` for all trials, as in its YAML file.
        param_space: settings to search, dotted or nested; each is a list of choices, or low and high, with log true to sample
            log-uniformly; integer bounds give integers.
        num_trials: number of trials, each with different settings.
        max_concurrent_trials: number of trials that run at the same time; they share the CPU cores.
        reduction_factor: reduction factor of ASHA; one of this many trials continues at each rung.
        seed: random seed of the sampling.
        address: address of the Ray cluster to run on.
    """

    name: str = "swept"
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    param_space: dict[str, Any] = field(
        default_factory=lambda: {
            "train.learning_rate": {"low": 0.01, "high": 0.2, "log": True},
            "objective_options.gamma": [0.0, 1.0, 2.0, 5.0],
        }
    )
    num_trials: int = 8
    max_concurrent_trials: int = 1
    reduction_factor: float = 3
    seed: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.num_trials < 1 or self.max_concurrent_trials < 1:
            raise UsageError(
                f"num_trials ({self.num_trials}) and max_concurrent_trials ({self.max_concurrent_trials}) must be at least 1"
            )
        if self.reduction_factor <= 1:
            raise UsageError(f"reduction_factor must be above 1, not {self.reduction_factor}")
        domains = flatten_space(self.param_space)
        if not domains:
            raise UsageError("param_space is empty: add settings to search, each with a list of choices or with low and high")
        for key, values in domains.items():
            _check_domain(key, values)


def flatten_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the domain of each setting by its dotted name.

    Args:
        space: dotted or nested settings.
        prefix: text before every name.
    """
    domains: dict[str, Any] = {}
    for key, values in space.items():
        if isinstance(values, Mapping) and not {"low", "high"} & set(values):
            domains |= flatten_space(values, f"{prefix}{key}.")
        else:
            domains[f"{prefix}{key}"] = values
    return domains


def draw_settings(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the settings of each trial by dotted name.

    The result depends on the seed alone, and a larger number of trials extends the list. A space with fewer combinations than
    trials gives each combination once.
    """
    generator = random.Random(config.seed)
    domains = flatten_space(config.param_space)
    samples: list[dict[str, Any]] = []
    for _ in range(DRAWS * config.num_trials):
        sample = {key: _draw(values, generator) for key, values in domains.items()}
        if sample not in samples:
            samples.append(sample)
        if len(samples) == config.num_trials:
            break
    return samples


def _check_domain(key: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        raise UsageError(f"param_space.{key}: give a list of choices, or low and high (and log: true)")
    low, high = values["low"], values["high"]
    if not all(isinstance(value, int | float) for value in (low, high)):
        raise UsageError(f"param_space.{key}: low and high must be numbers, not {low!r} and {high!r}")
    if low >= high:
        raise UsageError(f"param_space.{key}: low ({low}) must be below high ({high})")
    if values.get("log") and low <= 0:
        raise UsageError(f"param_space.{key}: low must be above 0 if log is true, not {low}")


def _draw(values: Any, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    low, high = values["low"], values["high"]
    integers = isinstance(low, int) and isinstance(high, int)
    # Include `high` itself, with the same probability as the other integers.
    top = high + 1 if integers else high
    value = exp(generator.uniform(log(low), log(top))) if values.get("log") else generator.uniform(low, top)
    # Round to four significant digits, so that the tables show the exact value.
    return min(int(value // 1), high) if integers else min(max(float(f"{value:.4g}"), low), high)

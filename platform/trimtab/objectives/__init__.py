"""Objectives: how a prefix is learned. One file each, registered by name.

An objective is a frozen dataclass of its settings with a `__call__` that takes `Scores` and gives one loss for each row.
Other packages add theirs through the entry-point group `trimtab.objectives`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Protocol

from torch import Tensor

from trimtab.errors import NotFoundError


@dataclass(frozen=True)
class Scores:
    """What the frozen model gave for a micro-batch of B rows, with the prefix in place.

    `logp` [B, T]: natural log-probability of each target token; `mask` [B, T]: 1.0 where there is one; `drift` [B]: mean
    KL(base || prefixed) over a row's target tokens, zeros unless the objective asked for it.
    """

    logp: Tensor
    mask: Tensor
    drift: Tensor


class Objective(Protocol):
    """Gives each row's loss; the trainer weighs and averages them over the whole batch of all workers."""

    @property
    def needs_drift(self) -> bool:
        """Whether `Scores.drift` must be computed (a second forward pass without the prefix, on plain benign rows)."""
        ...

    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B] of each row, differentiable in the prefix."""
        ...


_REGISTRY: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make an objective known by this name."""

    def add(cls: type) -> type:
        _REGISTRY[name] = cls
        return cls

    return add


def get(name: str) -> type:
    """The class of an objective; NotFoundError with the names there are."""
    _load_all()
    if name not in _REGISTRY:
        raise NotFoundError(f"no objective {name!r}; there are: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All known objectives."""
    _load_all()
    return sorted(_REGISTRY)


def _load_all() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="trimtab.objectives"):
        entry.load()

"""Objectives: how a prefix is learned. One file each, registered by name.

An objective is a frozen dataclass of its settings with a `__call__` that takes `Scores` and gives one loss for each row. What
it wants to see beyond the log-probabilities of the targets it says in `needs`; nothing else is computed.
Other packages add theirs through the entry-point group `trimtab.objectives`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trimtab.util.method_registry import MethodRegistry

Need = Literal["reference", "drift", "rejected", "odds", "anchor", "states"]


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Scores:
    """What the frozen model gave for a micro-batch of B rows, with the prefix in place. All log-probabilities are natural.

    Always there: `logp` [B, T] of each target token, `mask` [B, T]: 1.0 where there is one, `harmful` [B] bool.
    By need, else empty:
    reference: `reference` [B, T]: `logp` without the prefix (the same frozen weights).
    drift: `drift` [B]: KL(base || prefixed) of plain benign rows, 0 for others; its mean, weighed as the loss is, is that over
        all target tokens of plain benign rows.
    rejected: `rejected_logp`, `rejected_mask`, `rejected_reference` [B, R] of the answer that is not wanted.
    odds: `odds` [B]: log-odds of the openers of refusals against those of help at the first token of the answer.
    anchor: `anchor` [B, T]: `logp` under the vectors as they were at `switch`; empty before.
    states: `states` and `base_states` [B, d]: last hidden state before the answer, with and without the prefix.
    `running` [tracked]: what the objective's `observe` has gathered so far.
    """

    logp: Tensor
    mask: Tensor
    harmful: Tensor
    reference: Tensor = field(default_factory=_nothing)
    drift: Tensor = field(default_factory=_nothing)
    rejected_logp: Tensor = field(default_factory=_nothing)
    rejected_mask: Tensor = field(default_factory=_nothing)
    rejected_reference: Tensor = field(default_factory=_nothing)
    odds: Tensor = field(default_factory=_nothing)
    anchor: Tensor = field(default_factory=_nothing)
    states: Tensor = field(default_factory=_nothing)
    base_states: Tensor = field(default_factory=_nothing)
    running: Tensor = field(default_factory=_nothing)

    @property
    def nll(self) -> Tensor:
        """Mean negative log-probability [B] of each row's target tokens, in nats."""
        return -(self.logp * self.mask).sum(1) / self.mask.sum(1)

    @property
    def gain(self) -> Tensor:
        """What the prefix adds to the log-probability of the whole target [B], in nats; needs `reference`."""
        return ((self.logp - self.reference) * self.mask).sum(1)

    @property
    def rejected_gain(self) -> Tensor:
        """The same of the rejected answer; needs `reference` and `rejected`."""
        return ((self.rejected_logp - self.rejected_reference) * self.rejected_mask).sum(1)


class Objective(ABC):
    """What every objective is; most say what they need and give a loss."""

    tracked = 0
    """How many numbers `observe` gives."""
    switch = 0.0
    """Share of the steps after which the vectors of that moment become the anchor; 0 for no anchor."""

    @property
    def needs(self) -> frozenset[Need]:
        """What `Scores` must hold beyond the targets."""
        return frozenset()

    @abstractmethod
    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B] of each row, differentiable in the prefix; the trainer weighs and averages them over the whole batch."""

    def observe(self, scores: Scores) -> Tensor:
        """Sums [tracked] over a micro-batch; those of the whole batch, of all workers, go to `track`."""
        return torch.zeros(self.tracked)

    def track(self, running: Tensor, observed: Tensor) -> Tensor:
        """`running` [tracked] after a step whose batch gave the sums `observed`."""
        return running

    def fitted(self, states: Tensor, odds: Tensor, harmful: Tensor) -> "Objective":
        """Called once before training where `states` are needed: base states [N, d], log-odds [N] and labels [N] of rows."""
        return self


_known: MethodRegistry[Objective] = MethodRegistry("objective", __name__, __path__)
register, get_objective, list_objectives = _known.register, _known.get_method, _known.list_names

"""Objectives: loss functions of prefix training.

Each objective is a frozen dataclass of its settings in its own file, registered by name. Its `__call__` takes `Scores` and
returns one loss per row. `needs` names the inputs that it requires beyond the log-probabilities of the targets; no other inputs
are computed. Other packages add objectives through the entry-point group `trimtab.objectives`.

In docstrings, [paper] marks elements of the cited paper, and [trimtab] marks deviations from it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trimtab.util.method_registry import MethodRegistry

Need = Literal["reference", "drift", "rejected", "odds", "anchor", "states", "teacher"]


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Scores:
    """Outputs of the frozen model with the prefix for a micro-batch of B rows. All log-probabilities are natural.

    `mask`, `harmful` and `running` are always set, and `logp` unless the objective reads no targets. The other tensors are
    empty unless the objective needs them.

    Attributes:
        logp: log-probability of each target token [B, T].
        mask: 1.0 for each target token, 0.0 for padding [B, T].
        harmful: whether the prompt is harmful [B], bool.
        reference: `logp` of the base model without the prefix [B, T]. Need: `reference`.
        drift: KL(base || prefixed) of plain benign rows, 0 for others [B]. Its mean, weighted as the loss is, equals the mean
            over all target tokens of plain benign rows. Need: `drift`.
        rejected_logp: log-probability of each token of the rejected answer [B, R]. Need: `rejected`.
        rejected_mask: 1.0 for each token of the rejected answer, 0.0 for padding [B, R]. Need: `rejected`.
        rejected_reference: `rejected_logp` of the base model without the prefix [B, R]. Needs: `rejected` and `reference`.
        odds: log-odds of refusal openers against help openers at the first token of the answer [B]. Need: `odds`.
        anchor: `logp` under the vectors at the `switch` step [B, T]; empty before that step. Need: `anchor`.
        states: last hidden state before the answer, with the prefix [B, d]. Need: `states`.
        base_states: last hidden state before the answer, without the prefix [B, d]. Need: `states`.
        running: values that `track` has accumulated so far [tracked].
        divergence: KL(teacher || prefixed) of each target token, 0 for padding [B, T]. Need: `teacher`.
    """

    logp: Tensor
    mask: Tensor
    harmful: Tensor
    reference: Tensor = field(default_factory=_empty)
    drift: Tensor = field(default_factory=_empty)
    rejected_logp: Tensor = field(default_factory=_empty)
    rejected_mask: Tensor = field(default_factory=_empty)
    rejected_reference: Tensor = field(default_factory=_empty)
    odds: Tensor = field(default_factory=_empty)
    anchor: Tensor = field(default_factory=_empty)
    states: Tensor = field(default_factory=_empty)
    base_states: Tensor = field(default_factory=_empty)
    running: Tensor = field(default_factory=_empty)
    divergence: Tensor = field(default_factory=_empty)

    @property
    def row_loss(self) -> Tensor:
        """Loss of each row for reports [B], in nats per token: the divergence from a teacher if there is one, else `nll`."""
        return self.mean_divergence if len(self.divergence) else self.nll

    @property
    def mean_divergence(self) -> Tensor:
        """Mean divergence over each row's target tokens [B], in nats; needs `teacher`."""
        return (self.divergence * self.mask).sum(1) / self.mask.sum(1)

    @property
    def nll(self) -> Tensor:
        """Mean negative log-probability of each row's target tokens [B], in nats."""
        return -(self.logp * self.mask).sum(1) / self.mask.sum(1)

    @property
    def gain(self) -> Tensor:
        """Increase of the target's log-probability by the prefix [B], in nats; needs `reference`."""
        return ((self.logp - self.reference) * self.mask).sum(1)

    @property
    def rejected_gain(self) -> Tensor:
        """Increase of the rejected answer's log-probability by the prefix [B], in nats; needs `reference` and `rejected`."""
        return ((self.rejected_logp - self.rejected_reference) * self.rejected_mask).sum(1)


class Objective(ABC):
    """Base class of objectives; most subclasses define only `needs` and `__call__`."""

    tracked = 0
    """Number of values that `observe` returns."""
    reads_targets = True
    """Whether the objective reads the log-probabilities of the targets."""
    switch = 0.0
    """Share of the steps after which the current vectors become the anchor; 0 for no anchor."""

    @property
    def needs(self) -> frozenset[Need]:
        """Inputs that `Scores` must hold beyond the targets."""
        return frozenset()

    @abstractmethod
    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss of each row [B], differentiable in the prefix; the trainer weights and averages the losses."""

    def observe(self, scores: Scores) -> Tensor:
        """Compute sums over a micro-batch.

        The trainer adds them up over all micro-batches and workers and passes the totals to `track`.

        Returns:
            Sums [tracked].
        """
        return torch.zeros(self.tracked)

    def track(self, running: Tensor, observed: Tensor) -> Tensor:
        """Update the tracked values after a step.

        Args:
            running: tracked values before the step [tracked].
            observed: sums of the step's batch [tracked].

        Returns:
            Tracked values after the step [tracked].
        """
        return running

    def fitted(self, states: Tensor, odds: Tensor, harmful: Tensor) -> "Objective":
        """Return the objective fitted to the base model; called once before training if `states` are needed.

        Args:
            states: base states of rows [N, d].
            odds: log-odds of refusal openers against help openers [N].
            harmful: whether each prompt is harmful [N].
        """
        return self


_registry: MethodRegistry[Objective] = MethodRegistry("objective", __name__, __path__)
register, get_objective, list_objectives = _registry.register, _registry.get_method, _registry.list_names

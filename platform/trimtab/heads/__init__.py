"""Heads: small networks that tell right answers from made-up ones by the frozen model's signals. One file each, by name.

A head is a torch module whose keyword arguments are its settings. `forward` gives a score [N] from psi and phi, higher where
the answer seems more truthful; `fit` learns it. Other packages add theirs through the entry-point group `trimtab.heads`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trimtab.errors import UsageError
from trimtab.util.method_registry import MethodRegistry


@dataclass(frozen=True)
class DetectorRows:
    """Signals of N answers: `psi` [N, L, 3d] at L layers, `phi` [N, 7] z-scored, `truthful` [N]: 1 for a right answer, 0 for a
    made-up one and NaN for an unlabelled one, and `spread` [N], the semantic entropy of more samples, where there are some."""

    psi: Tensor
    phi: Tensor
    truthful: Tensor
    spread: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.phi)

    def __getitem__(self, chosen: Tensor) -> "DetectorRows":
        """Those rows that an index or a mask chooses."""
        return DetectorRows(
            self.psi[chosen], self.phi[chosen], self.truthful[chosen], self.spread[chosen] if len(self.spread) else self.spread
        )

    @property
    def labelled(self) -> "DetectorRows":
        """Rows whose truth is known."""
        return self[~self.truthful.isnan()]

    @property
    def unlabelled(self) -> "DetectorRows":
        """The others."""
        return self[self.truthful.isnan()]

    @property
    def end(self) -> Tensor:
        """Last states [N, d] at the highest of the layers."""
        return self.psi[:, -1, : self.psi.shape[-1] // 3]


@dataclass(frozen=True)
class TrainingSchedule:
    """How a head is trained: AdamW, on shuffled batches. `batch` answers at once; `decay` is the weight decay."""

    epochs: int = 20
    batch: int = 128
    learning_rate: float = 8e-4
    decay: float = 0.01


class Head(nn.Module, ABC):
    """What every head is; most say a `forward`, some a loss of their own. `joint`: it looks at all layers that it is given, not
    only at the highest. `taught`: it learns from labels."""

    schedule = TrainingSchedule()
    joint = True
    taught = True

    @abstractmethod
    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Score [N] from psi [N, L, 3d] and phi [N, 7]; higher is more truthful."""

    def loss(self, psi: Tensor, phi: Tensor, truthful: Tensor) -> Tensor:
        """Loss of a batch of labelled answers: the logistic one, both classes with the same weight."""
        right = truthful.mean().clamp(0.01, 0.99)
        weights = torch.where(truthful == 1, 0.5 / right, 0.5 / (1 - right))
        return binary_cross_entropy_with_logits(self(psi, phi), truthful, weights)

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Learn from the labelled rows; keeps the weights of the epoch with the best AUROC on `validation`."""
        run_gradient_descent(self, train.labelled, validation, seed)


class BestWeights:
    """The weights of a module when it did best."""

    def __init__(self, module: nn.Module, reached: float = -1.0) -> None:
        self.module, self.reached = module, reached
        self._weights = {name: value.clone() for name, value in module.state_dict().items()}

    def update(self, reached: float) -> None:
        """Keep the weights as they are now, where they reach more than those that are kept."""
        if reached > self.reached:
            self.reached, self._weights = reached, {name: value.clone() for name, value in self.module.state_dict().items()}

    def restore(self) -> None:
        """Put the kept weights back."""
        self.module.load_state_dict(self._weights)


def run_gradient_descent(
    head: Head, train: DetectorRows, validation: DetectorRows, seed: int, epochs: int | None = None
) -> float:
    """Train by `head.loss` after `head.schedule`, or for so many epochs; keep the one that is best on validation, and give its
    AUROC there.

    Raises UsageError where a class is missing among the rows.
    """
    has_both_classes(train.truthful, "training")
    has_both_classes(validation.truthful, "validation")
    plan = head.schedule
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad], lr=plan.learning_rate, weight_decay=plan.decay, fused=True
    )
    best = BestWeights(head)
    for _ in range(epochs or plan.epochs):
        head.train()
        for chosen in torch.randperm(len(train), generator=generator).split(plan.batch):
            rows = train[chosen]
            optimiser.zero_grad()
            head.loss(rows.psi, rows.phi, rows.truthful).backward()
            optimiser.step()
        best.update(compute_auroc(predict_scores(head, validation), validation.truthful))
    best.restore()
    head.eval()
    return best.reached


def has_both_classes(truthful: Tensor, name: str) -> None:
    """UsageError where labels [N] are all of one class."""
    if len(truthful.unique()) < 2:
        raise UsageError(f"the {name} rows are all of one class; a detector needs right answers and made-up ones")


@torch.no_grad()
def predict_scores(head: Head, rows: DetectorRows) -> Tensor:
    """Scores [N] of rows by a head that is done learning."""
    head.eval()
    return head(rows.psi, rows.phi)


def compute_auroc(scores: Tensor, truthful: Tensor) -> float:
    """Share of pairs of a right and a made-up answer that the scores put in order, ties counting half."""
    right, wrong = scores[truthful == 1].double(), scores[truthful == 0].double().sort().values
    if not len(right) or not len(wrong):
        return 0.5
    below = torch.searchsorted(wrong, right, side="left").double()
    upto = torch.searchsorted(wrong, right, side="right").double()
    return ((below + upto) / 2 / len(wrong)).mean().item()


_known: MethodRegistry[Head] = MethodRegistry("head", __name__, __path__)
register, get_head, list_heads = _known.register, _known.get_method, _known.list_names

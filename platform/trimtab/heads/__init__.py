"""Heads: small networks that classify answers as right or made up from the signals of the frozen model.

Each head is a torch module in its own file, registered by name; its keyword arguments are its settings. `forward` returns a
score [N] from psi and phi, higher for answers that seem more truthful, and `fit` trains the module. Other packages add heads
through the entry-point group `trimtab.heads`.

In docstrings, [paper] marks elements of the cited paper, and [trimtab] marks deviations from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trimtab.errors import UsageError
from trimtab.util.method_registry import MethodRegistry


@dataclass(frozen=True)
class DetectorRows:
    """Signals and labels of N answers.

    Attributes:
        psi: features [N, L, 3d] at L layers.
        phi: standardized trace features [N, 7].
        truthful: labels [N]: 1 for a right answer, 0 for a made-up one, NaN for an unlabeled one.
        spread: semantic entropies of additional samples [N]; empty if none were collected.
        windows: features [W, L, 3d] of the windows of each prompt, None for prompts of one window; empty if they are not read.
    """

    psi: Tensor
    phi: Tensor
    truthful: Tensor
    spread: Tensor = field(default_factory=lambda: torch.empty(0))
    windows: Sequence[Tensor | None] = ()

    def __len__(self) -> int:
        return len(self.phi)

    def __getitem__(self, chosen: Tensor) -> "DetectorRows":
        """Select rows by an index or a mask."""
        spread = self.spread[chosen] if len(self.spread) else self.spread
        rows = torch.arange(len(self))[chosen].tolist() if self.windows else []
        windows = [self.windows[row] for row in rows]
        return DetectorRows(self.psi[chosen], self.phi[chosen], self.truthful[chosen], spread, windows)

    def select_layers(self, layers: Sequence[int]) -> "DetectorRows":
        """Select layers of the features by their indices."""
        indices = list(layers)
        windows = [None if window is None else window[:, indices] for window in self.windows]
        return replace(self, psi=self.psi[:, indices], windows=windows)

    @property
    def labelled(self) -> "DetectorRows":
        """Labeled rows."""
        return self[~self.truthful.isnan()]

    @property
    def unlabelled(self) -> "DetectorRows":
        """Unlabeled rows."""
        return self[self.truthful.isnan()]

    @property
    def end(self) -> Tensor:
        """Last states [N, d] at the highest layer."""
        return get_end_states(self.psi)


def get_end_states(psi: Tensor) -> Tensor:
    """Return the last states [N, d] at the highest layer from psi [N, L, 3d]."""
    return psi[:, -1, : psi.shape[-1] // 3]


@dataclass(frozen=True)
class TrainingSchedule:
    """Training schedule of a head: AdamW on shuffled batches.

    Attributes:
        epochs: number of epochs.
        batch: number of answers in a batch.
        learning_rate: learning rate of AdamW.
        decay: weight decay of AdamW.
    """

    epochs: int = 20
    batch: int = 128
    learning_rate: float = 8e-4
    decay: float = 0.01


class Head(nn.Module, ABC):
    """Base class of heads; most subclasses define only `forward`, some also their own `loss`.

    Constructors must work on torch's `meta` device, on which the shapes of a saved head are compared before it is loaded.

    Attributes:
        schedule: training schedule.
        joint: whether the head reads all given layers, not only the highest.
        taught: whether the head trains on labels.
        reads_trace: whether the head reads phi; if not, engines need not store the statistics of tokens.
    """

    schedule = TrainingSchedule()
    joint = True
    taught = True
    reads_trace = True

    @abstractmethod
    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the score of each answer; higher is more truthful.

        Args:
            psi: features [N, L, 3d].
            phi: standardized trace features [N, 7].

        Returns:
            Scores [N].
        """

    def loss(self, psi: Tensor, phi: Tensor, truthful: Tensor) -> Tensor:
        """Compute the loss of a batch of labeled answers: by default the logistic loss with equal weight for both classes.

        Args:
            psi: features [N, L, 3d].
            phi: standardized trace features [N, 7].
            truthful: labels [N], 1 for a right answer and 0 for a made-up one.

        Returns:
            Scalar loss.
        """
        right = truthful.mean().clamp(0.01, 0.99)
        weights = torch.where(truthful == 1, 0.5 / right, 0.5 / (1 - right))
        return binary_cross_entropy_with_logits(self(psi, phi), truthful, weights)

    def fit(self, train: DetectorRows, validation: DetectorRows, seed: int) -> None:
        """Train on the labeled rows, and keep the weights of the epoch with the best AUROC on `validation`.

        Args:
            train: training rows.
            validation: validation rows.
            seed: seed of the training.
        """
        run_gradient_descent(self, train.labelled, validation, seed)


class EndStateMlp(Head):
    """Base class of heads that classify only the last state at the highest given layer.

    Attributes:
        network: module that maps last states [N, d] to scores [N, 1].
    """

    joint = False
    reads_trace = False
    network: nn.Module

    def forward(self, psi: Tensor, phi: Tensor) -> Tensor:
        """Compute the scores [N] from psi [N, L, 3d]; phi is not used."""
        return self.network(get_end_states(psi))[:, 0]


class BestWeights:
    """Snapshot of the best weights of a module during training.

    Args:
        module: module that is trained.
        reached: metric of the initial weights.
    """

    def __init__(self, module: nn.Module, reached: float = -1.0) -> None:
        self.module, self.reached = module, reached
        self._weights = {name: value.clone() for name, value in module.state_dict().items()}

    def update(self, reached: float) -> None:
        """Store the current weights if their metric `reached` exceeds that of the stored weights."""
        if reached > self.reached:
            self.reached, self._weights = reached, {name: value.clone() for name, value in self.module.state_dict().items()}

    def restore(self) -> None:
        """Load the stored weights into the module."""
        self.module.load_state_dict(self._weights)


def run_gradient_descent(
    head: Head, train: DetectorRows, validation: DetectorRows, seed: int, epochs: int | None = None
) -> float:
    """Train a head with `head.loss` and `head.schedule`, and keep the weights of the epoch that is best on validation.

    Args:
        head: head to train.
        train: training rows, all labeled.
        validation: validation rows.
        seed: seed of the shuffling.
        epochs: number of epochs, or None for that of the schedule.

    Returns:
        AUROC of the kept weights on validation.

    Raises:
        UsageError: if the training or validation rows lack a class.
    """
    check_both_classes(train.truthful, "training")
    check_both_classes(validation.truthful, "validation")
    schedule = head.schedule
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad], lr=schedule.learning_rate, weight_decay=schedule.decay, fused=True
    )
    best = BestWeights(head)
    for _ in range(epochs or schedule.epochs):
        head.train()
        for chosen in torch.randperm(len(train), generator=generator).split(schedule.batch):
            rows = train[chosen]
            optimizer.zero_grad()
            head.loss(rows.psi, rows.phi, rows.truthful).backward()
            optimizer.step()
        best.update(compute_auroc(predict_scores(head, validation), validation.truthful))
    best.restore()
    head.eval()
    return best.reached


def check_both_classes(truthful: Tensor, name: str) -> None:
    """Raise UsageError if all labels are of one class.

    Args:
        truthful: labels [N].
        name: name of the rows in the error message.
    """
    if len(truthful.unique()) < 2:
        raise UsageError(f"the {name} rows are all of one class; a detector needs right and made-up answers")


def predict_scores(head: Head, rows: DetectorRows) -> Tensor:
    """Compute the scores [N] of rows with a trained head; a prompt with windows has the lowest of their scores and its own."""
    head.eval()
    return score_with_windows(head, rows.psi, rows.phi, rows.windows)


@torch.no_grad()
def score_with_windows(head: nn.Module, psi: Tensor, phi: Tensor, windows: Sequence[Tensor | None]) -> Tensor:
    """Compute the scores [N] of rows; a prompt with windows has the lowest of their scores and its own.

    Args:
        head: trained head, in evaluation mode.
        psi: features [N, L, 3d].
        phi: standardized trace features [N, 7].
        windows: features [W, L, 3d] of the windows of each prompt, None for prompts of one window; empty if they are not read.
    """
    scores = head(psi, phi)
    listed = [(row, window) for row, window in enumerate(windows) if window is not None]
    if not listed:
        return scores
    owners = torch.tensor([row for row, window in listed for _ in window], device=psi.device)
    states = torch.cat([window for _, window in listed])
    return scores.scatter_reduce(0, owners, head(states, phi[owners]), "amin")


def compute_auroc(scores: Tensor, truthful: Tensor) -> float:
    """Compute the AUROC of scores.

    The AUROC is the share of pairs of a right and a made-up answer that the scores order correctly; ties count half.

    Args:
        scores: scores [N].
        truthful: labels [N], 1 for a right answer and 0 for a made-up one.

    Returns:
        AUROC from 0 to 1; 0.5 if a class is missing.
    """
    right, wrong = scores[truthful == 1].double(), scores[truthful == 0].double().sort().values
    if not len(right) or not len(wrong):
        return 0.5
    below = torch.searchsorted(wrong, right, side="left").double()
    up_to = torch.searchsorted(wrong, right, side="right").double()
    return ((below + up_to) / 2 / len(wrong)).mean().item()


_registry: MethodRegistry[Head] = MethodRegistry("head", __name__, __path__)
register, get_head, list_heads = _registry.register, _registry.get_method, _registry.list_names

"""Validation of a prefix: the loss of each class, and the decision to refuse or to help.

The loss is dominated by the wording of answers. Whether a prefix makes the model refuse harmful prompts and help with benign
ones shows in the first token of the answer. The decision is therefore the probability of the openers of the right side, against
those of the other side [ours].
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.jobs.align.state import TrainState
from trimtab.jobs.align.step import PER_CLASS, class_means
from trimtab.objectives import Need, Scores
from trimtab.objectives.likelihood import Likelihood
from trimtab.types import LABELS, Selection

# Columns for the sum of the decisions and the number of rows of each side, benign and harmful.
COLUMNS = {**PER_CLASS, "decision": 2, "side_rows": 2}


@dataclass(frozen=True)
class ValidationLoss(Likelihood):
    """Loss of the validation rows. It is the same for every objective without a teacher, so that their curves can be compared.

    Args:
        distils: whether the loss is the divergence from a teacher.
    """

    distils: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """The teacher if there is one, else the inputs of `sum_decisions`."""
        return frozenset({"teacher"}) if self.distils else frozenset({"odds"})


def sum_decisions(scores: Scores) -> dict[str, Tensor]:
    """Sum the decisions of a micro-batch by side.

    Args:
        scores: scores of the micro-batch. Without `odds`, as in a distillation, there are no decisions.

    Returns:
        `decision`, the sum of the probabilities of the right openers, and `side_rows`; each float64 [2], benign and harmful.
    """
    if not scores.odds.numel():
        return {name: torch.zeros(2, dtype=torch.float64) for name in ("decision", "side_rows")}
    right = torch.sigmoid(torch.where(scores.harmful, scores.odds, -scores.odds)).double().cpu()
    sides = torch.stack([~scores.harmful, scores.harmful]).double().cpu()
    return {"decision": sides @ right, "side_rows": sides.sum(1)}


def summarize_validation(sums: Mapping[str, Tensor], trained: Collection[str] = LABELS) -> dict[str, float]:
    """Compute the metrics of a validation.

    Args:
        sums: sums over all validation rows, by the names of `COLUMNS`.
        trained: classes that the prefix is trained on. A prefix for one side is not selected by what it does to the other one.

    Returns:
        Losses as `validation_<class>`, their mean over the classes as `validation_loss`, and, if there are rows of all trained
        sides, the mean decision over these sides as `validation_decision`.
    """
    losses = class_means(sums)
    metrics = {f"validation_{name}": value for name, value in losses.items()}
    metrics["validation_loss"] = sum(losses.values()) / max(1, len(losses))
    sides = torch.tensor([any(label != "harmful" for label in trained), "harmful" in trained])
    if (sums["side_rows"][sides] > 0).all():
        metrics["validation_decision"] = (sums["decision"] / sums["side_rows"])[sides].mean().item()
    return metrics


def select_vectors(state: TrainState, metrics: Mapping[str, float], selection: Selection) -> None:
    """Update the best vectors of the state, or its count of validations without a better value.

    Args:
        state: state to update in place.
        metrics: metrics of the validation at the current step.
        selection: metric that selects the vectors. Without rows of both sides it is the loss.
    """
    decides = selection == "decision" and "validation_decision" in metrics
    value = -metrics["validation_decision"] if decides else metrics["validation_loss"]
    if value < state.best_value:
        state.best, state.best_value, state.best_step, state.worse = state.vectors.clone(), value, state.step, 0
    else:
        state.worse += 1

"""Selection of the vectors of a prefix by the validation decision or the loss."""

import pytest
import torch

from trimtab.jobs.align.state import TrainState
from trimtab.jobs.align.validation import select_vectors, sum_decisions, summarize_validation
from trimtab.objectives import Scores


def build_sums(harmful, odds):
    scores = Scores(torch.zeros(len(odds), 1), torch.ones(len(odds), 1), torch.tensor(harmful), odds=torch.tensor(odds))
    losses = {"nll": torch.tensor([2.0, 1.0, 0.0]), "rows": torch.tensor([1.0, 1.0, 0.0])}
    return losses | sum_decisions(scores)


def test_decision_is_the_mean_over_sides_of_the_right_openers():
    metrics = summarize_validation(build_sums([True, True, True, False], [0.0, 0.0, 0.0, -100.0]))
    assert metrics["validation_decision"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["validation_loss"] == pytest.approx(1.5)
    assert (metrics["validation_harmful"], metrics["validation_benign_hard"]) == (2.0, 1.0)


def test_decision_of_a_prefix_for_one_side_is_that_of_its_side():
    sums = build_sums([True, False], [-100.0, 0.0])
    assert summarize_validation(sums, ["benign_hard"])["validation_decision"] == pytest.approx(0.5)
    assert summarize_validation(sums, ["harmful"])["validation_decision"] == pytest.approx(0.0)


def test_rows_of_one_side_have_no_decision():
    assert "validation_decision" not in summarize_validation(build_sums([True], [3.0]))


def select(selection, *validations):
    state = TrainState(torch.zeros(1, 2), {}, torch.zeros(1, 2), torch.zeros(0))
    for step, (decision, loss) in enumerate(validations, 1):
        state.step, state.vectors = step, torch.full((1, 2), float(step))
        metrics = {"validation_loss": loss} | ({} if decision is None else {"validation_decision": decision})
        select_vectors(state, metrics, selection)
    return state.best_step, state.best[0, 0].item(), state.worse


def test_decision_selects_vectors_whose_loss_is_higher():
    validations = [(0.6, 3.0), (0.8, 2.0), (0.7, 1.0)]
    assert select("decision", *validations) == (2, 2.0, 1)
    assert select("loss", *validations) == (3, 3.0, 0)


def test_loss_selects_if_there_is_no_decision():
    assert select("decision", (None, 3.0), (None, 2.0), (None, 2.5)) == (2, 2.0, 1)

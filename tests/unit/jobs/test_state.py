"""Update of the training state and the check for finite values."""

import pytest
import torch

from trimtab.errors import JobError
from trimtab.jobs.align.state import TrainState, update_vectors
from trimtab.jobs.align.step import check_finite


def test_update_equals_adamw_of_torch():
    """Results are bitwise equal with clipped gradients and a changing learning rate."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 8, generator=generator)
    moments = {"first": torch.zeros(2, 8), "second": torch.zeros(2, 8)}
    state = TrainState(vectors.clone(), moments, vectors.clone(), torch.zeros(0))
    parameter = vectors.clone().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)
    for step in range(20):
        gradient, rate = torch.randn(2, 8, generator=generator), 0.1 / (step + 1)
        update_vectors(state, gradient, rate, clip=1.0)
        state.step += 1
        parameter.grad = gradient * min(1.0, 1.0 / gradient.norm().item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert torch.equal(state.vectors, parameter)


@pytest.mark.parametrize("invalid", [float("nan"), float("inf")])
def test_non_finite_step_ends_training(invalid):
    finite = torch.ones(2, 3)
    check_finite(torch.tensor(1.0), finite, 7)
    for loss, gradient in ((torch.tensor(invalid), finite), (torch.tensor(1.0), torch.full((2, 3), invalid))):
        with pytest.raises(JobError, match=r"not finite at step 7\. Lower train\.learning_rate"):
            check_finite(loss, gradient, 7)

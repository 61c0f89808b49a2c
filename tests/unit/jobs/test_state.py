"""Update of the training state."""

import torch

from trimtab.jobs.align.state import TrainState, update_vectors


def test_update_equals_adamw_of_torch():
    """To the bit, with clipped gradients and a changing learning rate."""
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

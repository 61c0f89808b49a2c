"""Log-probabilities of tokens after hidden states, with the logits of only a few of them held at a time (ours)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# Bytes of logits at a time: on a CPU few enough for its caches, elsewhere enough to keep it busy.
CPU_BYTES = 16 << 20
DEVICE_BYTES = 256 << 20


def compute_token_logprobs(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Log-probability [N] of each of `tokens` [N], where the frozen `head` makes float32 logits [N, V] of `states` [N, d].

    A row depends on its own state alone and the head never learns, so that the gradient [N, d] is computed together with the
    value, part by part, and the backward pass only scales it. Differentiable once, in the states.
    """
    size = CPU_BYTES if states.device.type == "cpu" else DEVICE_BYTES
    parts = -(-4 * vocabulary * len(states) // size)
    return cast(Tensor, _TokenLogp.apply(states, tokens, head, parts))


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], parts: int) -> Tensor:
        learns = ctx.needs_input_grad[0]
        values, gradients = list[Tensor](), list[Tensor]()
        for some, wanted in zip(states.chunk(parts), tokens.chunk(parts), strict=True):
            leaf = some.detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                value = log_softmax(head(leaf), -1).gather(1, wanted[:, None])[:, 0]
            if learns:
                gradients += torch.autograd.grad(value, leaf, torch.ones_like(value))
            values.append(value.detach())
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None

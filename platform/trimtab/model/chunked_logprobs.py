"""Log-probabilities of tokens from hidden states, with logits computed in chunks to bound memory."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# Bytes of logits per chunk: on a CPU few enough to fit into its caches, on other devices enough to keep them busy.
CPU_BYTES = 16 << 20
DEVICE_BYTES = 256 << 20


def compute_token_logprobs(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Compute the log-probability of each token from the hidden state that predicts it.

    Each result depends on one state only and the head is frozen. The forward pass therefore also computes the gradient [N, d],
    chunk by chunk, and the backward pass only scales it. The result can be differentiated once, with respect to the states.

    Args:
        head: frozen head that maps states [N, d] to float32 logits [N, V].
        states: hidden states [N, d].
        tokens: token ids [N].
        vocabulary: vocabulary size V.

    Returns:
        Log-probabilities [N], in nats.
    """
    size = CPU_BYTES if states.device.type == "cpu" else DEVICE_BYTES
    parts = -(-4 * vocabulary * len(states) // size)
    return cast(Tensor, _TokenLogp.apply(states, tokens, head, parts))


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], parts: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        values, gradients = list[Tensor](), list[Tensor]()
        for chunk, targets in zip(states.chunk(parts), tokens.chunk(parts), strict=True):
            leaf = chunk.detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                value = log_softmax(head(leaf), -1).gather(1, targets[:, None])[:, 0]
            if needs_gradient:
                gradients += torch.autograd.grad(value, leaf, torch.ones_like(value))
            values.append(value.detach())
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None

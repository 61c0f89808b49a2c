"""Values per token from hidden states, with logits computed in chunks to bound memory.

Each value depends on one state only, and the head is frozen. The forward pass therefore also computes the gradient [N, d],
chunk by chunk, and the backward pass only scales it. Values can be differentiated once, with respect to the states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

Head = Callable[[Tensor], Tensor]
"""Frozen head that maps states [N, d] to float32 logits [N, V]."""
# Bytes of logits per chunk: on a CPU few enough to fit into its caches, on other devices enough to keep them busy.
CPU_BYTES = 16 << 20
DEVICE_BYTES = 256 << 20
# Lower bound of the probability of all tokens that are not listed.
SMALLEST = 1e-8


@dataclass(frozen=True)
class TopLogprobs:
    """Most likely tokens of N next-token distributions, and the mass of all others.

    Attributes:
        tokens: ids of the K most likely tokens [N, K].
        logprobs: their log-probabilities [N, K], in nats.
        rest: log-probability of all other tokens together [N], in nats.
    """

    tokens: Tensor
    logprobs: Tensor
    rest: Tensor


def compute_token_logprobs(head: Head, states: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Compute the log-probability of each token from the hidden state that predicts it.

    Args:
        head: frozen head.
        states: hidden states [N, d].
        tokens: token ids [N].
        vocabulary: vocabulary size V.

    Returns:
        Log-probabilities [N], in nats.
    """

    def compute(logits: Tensor, rows: Tensor) -> Tensor:
        return log_softmax(logits, -1).gather(1, tokens[rows, None])[:, 0]

    return _compute_values(head, states, compute, vocabulary)


def compute_divergences(head: Head, states: Tensor, teacher: TopLogprobs, vocabulary: int) -> Tensor:
    """Compute KL(teacher || student) of each next-token distribution, over the teacher's listed tokens and all others together.

    Args:
        head: frozen head.
        states: hidden states of the student [N, d].
        teacher: distributions of the teacher [N].
        vocabulary: vocabulary size V.

    Returns:
        Divergences [N], in nats; a lower bound of those over the whole vocabulary.
    """

    def compute(logits: Tensor, rows: Tensor) -> Tensor:
        student = log_softmax(logits, -1).gather(1, teacher.tokens[rows])
        student_rest = (1 - student.exp().sum(1)).clamp_min(SMALLEST).log()
        listed, rest = teacher.logprobs[rows], teacher.rest[rows]
        return (listed.exp() * (listed - student)).sum(1) + rest.exp() * (rest - student_rest)

    return _compute_values(head, states, compute, vocabulary)


def compute_top_logprobs(head: Head, states: Tensor, vocabulary: int, count: int) -> TopLogprobs:
    """Compute the `count` most likely tokens of each next-token distribution, without gradients.

    Args:
        head: frozen head.
        states: hidden states [N, d].
        vocabulary: vocabulary size V.
        count: number of tokens to list, fewer than V.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for chunk in states.chunk(_count_chunks(states, vocabulary)):
            values, tokens = log_softmax(head(chunk), -1).topk(count, -1)
            parts.append((tokens, values))
    tokens, logprobs = (torch.cat(columns) for columns in zip(*parts, strict=True))
    rest = (1 - logprobs.double().exp().sum(1)).clamp_min(SMALLEST).log().float()
    return TopLogprobs(tokens, logprobs, rest)


def _count_chunks(states: Tensor, vocabulary: int) -> int:
    size = CPU_BYTES if states.device.type == "cpu" else DEVICE_BYTES
    return max(1, -(-4 * vocabulary * len(states) // size))


def _compute_values(head: Head, states: Tensor, compute: Callable[[Tensor, Tensor], Tensor], vocabulary: int) -> Tensor:
    """Compute one value [N] per state from its logits; `compute` gets logits [n, V] and the indices of their states [n]."""
    return cast(Tensor, _ChunkedValues.apply(states, head, compute, _count_chunks(states, vocabulary)))


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Head, compute: Callable[[Tensor, Tensor], Tensor], parts: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        values, gradients = list[Tensor](), list[Tensor]()
        indices = torch.arange(len(states), device=states.device)
        for chunk, rows in zip(states.chunk(parts), indices.chunk(parts), strict=True):
            leaf = chunk.detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                value = compute(head(leaf), rows)
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

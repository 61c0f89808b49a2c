"""Batches of sequences of similar lengths."""

from collections.abc import Callable, Iterable, Sequence


def build_batches(order: Iterable[int], fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Split sequences into batches, each as long as the limits allow.

    Args:
        order: indices of the sequences, sorted by length, so that a batch has little padding.
        fits: whether a batch of indices is within the limits. A sequence that exceeds them forms a batch of its own.

    Returns:
        Indices of the sequences of each batch, in their order.
    """
    batches: list[list[int]] = []
    for index in order:
        if batches and fits([*batches[-1], index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

"""Batches of sequences of similar lengths."""

from trimtab.model.batching import build_batches


def test_batches_fill_the_limit_and_hold_each_sequence_once():
    lengths = [9, 4, 4, 2, 2, 1]
    assert build_batches(range(6), lambda batch: lengths[batch[0]] * len(batch) <= 8) == [[0], [1, 2], [3, 4, 5]]
    assert build_batches([], lambda batch: True) == []

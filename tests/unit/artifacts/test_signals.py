"""Signals: the figures of a hand-made answer, and the same from whole tensors as token by token, in any split."""

import math

import pytest
import torch

from trimtab.detection.signals import (
    SignalAccumulator,
    TokenStatistics,
    compute_token_statistics,
    compute_trace_features,
    concatenate_states,
)

LAYERS, WIDTH, LOW = 2, 5, -1.0


def request(seed: int, prompt: int, answer: int) -> tuple[torch.Tensor, torch.Tensor, TokenStatistics]:
    """States of prompt [P, L, d] and answer [m, L, d], and the reading of the answer's tokens [m]."""
    torch.manual_seed(seed)
    logits, tokens = torch.randn(answer, 11) * 3, torch.randint(11, (answer,))
    return (
        torch.randn(prompt, LAYERS, WIDTH),
        torch.randn(answer, LAYERS, WIDTH),
        compute_token_statistics(logits, tokens),
    )


def test_a_reading_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    read = compute_token_statistics(torch.tensor([[half, quarter, quarter]]), torch.tensor([1]))
    assert read.logp.item() == pytest.approx(quarter)
    assert read.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert read.margin.item() == pytest.approx(math.log(2))


def test_a_token_that_a_mask_forbids_leaves_everything_finite():
    read = compute_token_statistics(torch.tensor([[1.0, 0.5, -torch.inf]]), torch.tensor([0]))
    plain = compute_token_statistics(torch.tensor([[1.0, 0.5]]), torch.tensor([0]))
    assert read.entropy.item() == pytest.approx(plain.entropy.item())
    assert read.logp.item() == pytest.approx(plain.logp.item())


def test_a_trace_by_hand():
    phi = compute_trace_features(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 1.5]), torch.tensor([2.0, 4.0]), low=-2.0)
    assert phi.tolist() == [-2.0, -3.0, 1.0, 1.0, 3.0, 0.5, 2.0]


def test_token_by_token_is_the_same_as_whole_in_any_split():
    """Two requests at once, their prompts in pieces, in slots that others used before."""
    requests = {3: request(1, 7, 4), 1: request(2, 3, 6)}
    held = SignalAccumulator(5, LAYERS, WIDTH, (-9.0, LOW))
    used = torch.tensor([1, 3, 4])
    held.read(used, torch.randn(3, LAYERS, WIDTH))
    held.write(used, torch.randn(3, LAYERS, WIDTH), request(3, 1, 3)[2])
    held.clear(torch.tensor(list(requests)))
    for piece in (slice(0, 2), slice(2, 3), slice(3, 9)):
        states = [(slot, state) for slot, (prompt, _, _) in requests.items() for state in prompt[piece]]
        held.read(torch.tensor([slot for slot, _ in states]), torch.stack([state for _, state in states]))
    for at in range(6):
        now = [slot for slot, (_, answer, _) in requests.items() if at < len(answer)]
        states = torch.stack([requests[slot][1][at] for slot in now])
        parts = [torch.stack([getattr(requests[slot][2], name)[at] for slot in now]) for name in ("logp", "entropy", "margin")]
        held.write(torch.tensor(now), states, TokenStatistics(*parts))
    for slot, (prompt, answer, read) in requests.items():
        psi = concatenate_states(answer[-1], answer.mean(0), prompt.mean(0))
        torch.testing.assert_close(held.geometry(torch.tensor([slot]))[0], psi, rtol=1e-5, atol=1e-6)
        phi = compute_trace_features(read.logp, read.entropy, read.margin, LOW)
        torch.testing.assert_close(held.trace(torch.tensor([slot]), 1)[0], phi, rtol=1e-5, atol=1e-6)


def test_an_answer_of_one_token_has_no_spread():
    held = SignalAccumulator(1, LAYERS, WIDTH, (LOW,))
    prompt, answer, read = request(4, 2, 1)
    slot = torch.tensor([0])
    held.read(slot.expand(2), prompt)
    held.write(slot, answer, read)
    assert held.trace(slot)[0, 2] == 0
    assert torch.isfinite(held.geometry(slot)).all()


def test_tokens_that_were_written_past_a_stop_can_be_taken_back():
    """Also the lowest log-probability, where the token taken back had it."""
    prompt, answer, read = request(5, 3, 7)
    held, slot = SignalAccumulator(2, LAYERS, WIDTH, (LOW,)), torch.tensor([1])
    held.read(slot.expand(3), prompt)
    read.logp[5] = -20.0
    for at in range(7):
        held.write(
            slot, answer[at : at + 1], TokenStatistics(*(getattr(read, n)[at : at + 1] for n in ("logp", "entropy", "margin")))
        )
    held.take_back(1, 2)
    psi = concatenate_states(answer[4], answer[:5].mean(0), prompt.mean(0))
    torch.testing.assert_close(held.geometry(slot)[0], psi, rtol=1e-4, atol=1e-5)
    phi = compute_trace_features(read.logp[:5], read.entropy[:5], read.margin[:5], LOW)
    torch.testing.assert_close(held.trace(slot)[0], phi, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot take back 4 tokens"):
        held.take_back(1, 4)

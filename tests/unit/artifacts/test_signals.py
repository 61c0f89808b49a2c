"""Signals: the figures of a hand-made answer, and the same from whole tensors as token by token, in any split."""

import math

import pytest
import torch

from trimtab.detection.signals import (
    SignalAccumulator,
    compute_token_statistics,
    compute_trace_features,
    concatenate_states,
)

LAYERS, WIDTH = 2, 5


def request(seed: int, prompt: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States of prompt [P, L, d] and answer [m, L, d]."""
    torch.manual_seed(seed)
    return torch.randn(prompt, LAYERS, WIDTH), torch.randn(answer, LAYERS, WIDTH)


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


def test_a_trace_of_one_token_has_no_spread():
    phi = compute_trace_features(torch.tensor([-3.0]), torch.tensor([0.5]), torch.tensor([2.0]), low=-2.0)
    assert phi.tolist() == [-3.0, -3.0, 0.0, 0.5, 2.0, 1.0, 1.0]


def test_token_by_token_is_the_same_as_whole_in_any_split():
    """Two requests at once, their prompts in pieces, in slots that others used before."""
    requests = {3: request(1, 7, 4), 1: request(2, 3, 6)}
    held = SignalAccumulator(5, LAYERS, WIDTH)
    used = torch.tensor([1, 3, 4])
    held.read(used, torch.randn(3, LAYERS, WIDTH))
    held.write(used, torch.randn(3, LAYERS, WIDTH))
    held.clear(torch.tensor(list(requests)))
    for piece in (slice(0, 2), slice(2, 3), slice(3, 9)):
        states = [(slot, state) for slot, (prompt, _) in requests.items() for state in prompt[piece]]
        held.read(torch.tensor([slot for slot, _ in states]), torch.stack([state for _, state in states]))
    for at in range(6):
        now = [slot for slot, (_, answer) in requests.items() if at < len(answer)]
        held.write(torch.tensor(now), torch.stack([requests[slot][1][at] for slot in now]))
    for slot, (prompt, answer) in requests.items():
        psi = concatenate_states(answer[-1], answer.mean(0), prompt.mean(0))
        torch.testing.assert_close(held.geometry(torch.tensor([slot]))[0], psi, rtol=1e-5, atol=1e-6)


def test_an_answer_of_one_token_is_its_own_mean():
    held = SignalAccumulator(1, LAYERS, WIDTH)
    prompt, answer = request(4, 2, 1)
    slot = torch.tensor([0])
    held.read(slot.expand(2), prompt)
    held.write(slot, answer)
    torch.testing.assert_close(held.geometry(slot)[0], concatenate_states(answer[0], answer[0], prompt.mean(0)))


def test_tokens_that_were_written_past_a_stop_can_be_taken_back():
    """Also from a copy of the slot, as the engine does when a client reads the signals of a running request."""
    prompt, answer = request(5, 3, 7)
    held, slot = SignalAccumulator(2, LAYERS, WIDTH), torch.tensor([1])
    held.read(slot.expand(3), prompt)
    for state in answer:
        held.write(slot, state[None])
    copy = held.taken(1)
    held.take_back(1, 2)
    copy.take_back(0, 2)
    psi = concatenate_states(answer[4], answer[:5].mean(0), prompt.mean(0))
    torch.testing.assert_close(held.geometry(slot)[0], psi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.geometry(torch.tensor([0]))[0], psi, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot take back 4 tokens"):
        held.take_back(1, 4)

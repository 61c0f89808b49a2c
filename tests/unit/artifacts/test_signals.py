"""Signals of answers: token statistics, trace features and accumulated states."""

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


def create_states(seed: int, prompt: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Create random states of a prompt [P, L, d] and of its answer [m, L, d]."""
    torch.manual_seed(seed)
    return torch.randn(prompt, LAYERS, WIDTH), torch.randn(answer, LAYERS, WIDTH)


def test_token_statistics_equal_hand_computed_values():
    half, quarter = math.log(0.5), math.log(0.25)
    statistics = compute_token_statistics(torch.tensor([[half, quarter, quarter]]), torch.tensor([1]))
    assert statistics.logp.item() == pytest.approx(quarter)
    assert statistics.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert statistics.margin.item() == pytest.approx(math.log(2))


def test_masked_token_leaves_statistics_finite():
    masked = compute_token_statistics(torch.tensor([[1.0, 0.5, -torch.inf]]), torch.tensor([0]))
    plain = compute_token_statistics(torch.tensor([[1.0, 0.5]]), torch.tensor([0]))
    assert masked.entropy.item() == pytest.approx(plain.entropy.item())
    assert masked.logp.item() == pytest.approx(plain.logp.item())


def test_trace_features_equal_hand_computed_values():
    phi = compute_trace_features(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 1.5]), torch.tensor([2.0, 4.0]), low=-2.0)
    assert phi.tolist() == [-2.0, -3.0, 1.0, 1.0, 3.0, 0.5, 2.0]


def test_trace_of_one_token_has_no_spread():
    phi = compute_trace_features(torch.tensor([-3.0]), torch.tensor([0.5]), torch.tensor([2.0]), low=-2.0)
    assert phi.tolist() == [-3.0, -3.0, 0.0, 0.5, 2.0, 1.0, 1.0]


def test_accumulated_states_equal_whole_tensors():
    """Two concurrent requests, their prompts in chunks, in slots that were used before."""
    requests = {3: create_states(1, 7, 4), 1: create_states(2, 3, 6)}
    accumulator = SignalAccumulator(5, LAYERS, WIDTH)
    used_slots = torch.tensor([1, 3, 4])
    accumulator.read(used_slots, torch.randn(3, LAYERS, WIDTH))
    accumulator.write(used_slots, torch.randn(3, LAYERS, WIDTH))
    accumulator.clear(torch.tensor(list(requests)))
    for chunk in (slice(0, 2), slice(2, 3), slice(3, 9)):
        states = [(slot, state) for slot, (prompt, _) in requests.items() for state in prompt[chunk]]
        accumulator.read(torch.tensor([slot for slot, _ in states]), torch.stack([state for _, state in states]))
    for step in range(6):
        slots = [slot for slot, (_, answer) in requests.items() if step < len(answer)]
        accumulator.write(torch.tensor(slots), torch.stack([requests[slot][1][step] for slot in slots]))
    for slot, (prompt, answer) in requests.items():
        psi = concatenate_states(answer[-1], answer.mean(0), prompt.mean(0))
        torch.testing.assert_close(accumulator.geometry(torch.tensor([slot]))[0], psi, rtol=1e-5, atol=1e-6)


def test_mean_of_one_token_answer_is_its_state():
    accumulator = SignalAccumulator(1, LAYERS, WIDTH)
    prompt, answer = create_states(4, 2, 1)
    slot = torch.tensor([0])
    accumulator.read(slot.expand(2), prompt)
    accumulator.write(slot, answer)
    torch.testing.assert_close(accumulator.geometry(slot)[0], concatenate_states(answer[0], answer[0], prompt.mean(0)))


def test_written_tokens_can_be_taken_back():
    """Also from a copy of the slot, which the engine makes when a client reads the signals of a running request."""
    prompt, answer = create_states(5, 3, 7)
    accumulator, slot = SignalAccumulator(2, LAYERS, WIDTH), torch.tensor([1])
    accumulator.read(slot.expand(3), prompt)
    for state in answer:
        accumulator.write(slot, state[None])
    copy = accumulator.taken(1)
    accumulator.take_back(1, 2)
    copy.take_back(0, 2)
    psi = concatenate_states(answer[4], answer[:5].mean(0), prompt.mean(0))
    torch.testing.assert_close(accumulator.geometry(slot)[0], psi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.geometry(torch.tensor([0]))[0], psi, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot take back 4 tokens"):
        accumulator.take_back(1, 4)

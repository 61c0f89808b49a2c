"""Signals of answers: token statistics, trace features and accumulated states."""

import math

import pytest
import torch

from trimtab.detection.signals import (
    TRACE,
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


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_statistics_of_many_tokens_equal_those_of_each(count):
    """Tokens are processed in chunks of 16."""
    logits = torch.randn(count, 11, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = torch.arange(count) % 11
    statistics = compute_token_statistics(logits, tokens)
    logp = logits.float().log_softmax(-1)
    assert statistics.logp.dtype == statistics.entropy.dtype == statistics.margin.dtype == torch.float32
    torch.testing.assert_close(statistics.logp, logp[torch.arange(count), tokens])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits.float()).entropy())
    best, second = logits.float().sort(-1, descending=True).values[:, :2].unbind(-1)
    torch.testing.assert_close(statistics.margin, best - second, rtol=1e-4, atol=1e-5)


def test_states_are_concatenated_in_the_order_of_the_parts():
    psi = concatenate_states(torch.tensor([1.0]), torch.tensor([5.0]), torch.tensor([2.0]))
    assert psi.tolist() == [1.0, 5.0, 3.0]


@pytest.mark.parametrize(("low", "share"), [(-2.0, 0.25), (-1.0, 0.5), (-4.0, 0.0)])
def test_tokens_below_the_low_log_probability_count_as_low(low, share):
    logp = torch.tensor([-1.0, -0.5, -1.5, -4.0])
    phi = compute_trace_features(logp, torch.zeros(4), torch.zeros(4), low=low)
    assert phi[TRACE.index("low_share")] == share
    assert phi[TRACE.index("tokens")] == 4
    assert phi.dtype == torch.float32


def test_sums_of_states_equal_single_states():
    prompt, answer = create_states(6, 5, 2)
    by_token, by_sum = SignalAccumulator(2, LAYERS, WIDTH), SignalAccumulator(2, LAYERS, WIDTH)
    slot = torch.tensor([1])
    by_token.read(slot.expand(5), prompt)
    by_sum.read_sum(slot.expand(2), torch.stack([prompt[:2].sum(0), prompt[2:].sum(0)]), torch.tensor([2, 3]))
    for accumulator in (by_token, by_sum):
        for state in answer:
            accumulator.write(slot, state[None].to(torch.bfloat16))
    torch.testing.assert_close(by_sum.geometry(slot), by_token.geometry(slot), rtol=1e-5, atol=1e-6)
    assert by_sum.prompt_tokens.tolist() == [0, 5]
    assert by_sum.tokens.tolist() == [0, 2]


def test_clearing_a_slot_leaves_the_others():
    accumulator, slots = SignalAccumulator(3, LAYERS, WIDTH), torch.tensor([0, 1, 2])
    prompt, answer = create_states(7, 3, 3)
    accumulator.read(slots, prompt)
    accumulator.write(slots, answer)
    expected = accumulator.geometry(slots)[[0, 2]]
    accumulator.clear(torch.tensor([1]))
    assert torch.equal(accumulator.geometry(slots)[[0, 2]], expected)
    assert accumulator.tokens.tolist() == accumulator.prompt_tokens.tolist() == [1, 0, 1]
    assert not accumulator.prompt[1].any()
    assert not accumulator.answer[1].any()


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_up_to_three_tokens_can_be_taken_back(tokens):
    prompt, answer = create_states(8, 2, 6)
    accumulator, slot = SignalAccumulator(1, LAYERS, WIDTH), torch.tensor([0])
    accumulator.read(slot.expand(2), prompt)
    for state in answer:
        accumulator.write(slot, state[None])
    accumulator.take_back(0, tokens)
    left = answer[: 6 - tokens]
    psi = concatenate_states(left[-1], left.mean(0), prompt.mean(0))
    torch.testing.assert_close(accumulator.geometry(slot)[0], psi, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [-1, 4])
def test_rejects_other_numbers_of_tokens_to_take_back(tokens):
    with pytest.raises(ValueError, match=f"cannot take back {tokens} tokens: the number must be from 0 to 3"):
        SignalAccumulator(1, LAYERS, WIDTH).take_back(0, tokens)


def test_copy_of_a_slot_does_not_change_with_it():
    prompt, answer = create_states(9, 2, 3)
    accumulator, slot = SignalAccumulator(2, LAYERS, WIDTH), torch.tensor([1])
    accumulator.read(slot.expand(2), prompt)
    accumulator.write(slot, answer[:1])
    copy = accumulator.taken(1)
    expected = accumulator.geometry(slot)[0]
    accumulator.write(slot, answer[1:2])
    torch.testing.assert_close(copy.geometry(torch.tensor([0]))[0], expected)
    assert copy.tokens.tolist() == [1]

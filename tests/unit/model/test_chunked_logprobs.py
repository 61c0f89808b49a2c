"""Log-probabilities of target tokens and divergences from a teacher, computed in chunks."""

import pytest
import torch

from trimtab.model import chunked_logprobs
from trimtab.model.chunked_logprobs import compute_divergences, compute_token_logprobs, compute_top_logprobs

VOCABULARY = 96


@pytest.fixture
def logprob_inputs():
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, 16, dtype=torch.float64)
    sizes: list[int] = []

    def head(states):
        sizes.append(len(states))
        # Capped, as in Gemma: the head need not be linear.
        return torch.tanh(states @ weight.T / 5) * 5

    return head, torch.randn(23, 16, dtype=torch.float64), torch.randint(0, VOCABULARY, (23,)), sizes


@pytest.mark.parametrize("rows", [1, 4, 23, 100])
def test_values_and_gradients_equal_unchunked_logits(logprob_inputs, monkeypatch, rows):
    head, states, tokens, sizes = logprob_inputs
    monkeypatch.setattr(chunked_logprobs, "CPU_BYTES", rows * VOCABULARY * 4)
    weights = torch.rand(23, dtype=torch.float64)
    chunked, unchunked = states.clone().requires_grad_(), states.clone().requires_grad_()
    logp = compute_token_logprobs(head, chunked * 2, tokens, VOCABULARY)
    assert max(sizes) <= rows
    assert sum(sizes) == 23
    expected = head(unchunked * 2).log_softmax(-1)[torch.arange(23), tokens]
    assert torch.allclose(logp, expected)
    # The loss is not linear in the log-probabilities, as with a focal weight.
    (weights * logp.exp() * logp).sum().backward()
    (weights * expected.exp() * expected).sum().backward()
    assert torch.allclose(chunked.grad, unchunked.grad)


def test_no_gradient_is_computed_without_grad_mode(logprob_inputs):
    head, states, tokens, _ = logprob_inputs
    with torch.no_grad():
        logp = compute_token_logprobs(head, states, tokens, VOCABULARY)
    assert not logp.requires_grad
    assert torch.allclose(logp, head(states).log_softmax(-1)[torch.arange(23), tokens])


@pytest.mark.parametrize(("rows", "count"), [(4, 8), (100, VOCABULARY - 1)])
def test_divergences_and_gradients_equal_those_of_whole_distributions(logprob_inputs, monkeypatch, rows, count):
    head, states, _, sizes = logprob_inputs
    monkeypatch.setattr(chunked_logprobs, "CPU_BYTES", rows * VOCABULARY * 4)
    teacher_states = states + 0.3 * torch.randn_like(states)
    teacher = compute_top_logprobs(head, teacher_states, VOCABULARY, count)
    chunked, unchunked = states.clone().requires_grad_(), states.clone().requires_grad_()
    divergences = compute_divergences(head, chunked, teacher, VOCABULARY)
    assert max(sizes) <= rows
    full, student = head(teacher_states).log_softmax(-1), head(unchunked).log_softmax(-1)
    listed = torch.zeros(23, VOCABULARY, dtype=torch.bool).scatter(1, teacher.tokens, value=True)
    # Log-probabilities of the listed tokens, and of all others as one outcome.
    rest = [values.exp().masked_fill(listed, 0).sum(1).log() for values in (full, student)]
    expected = ((full.exp() * (full - student)) * listed).sum(1) + rest[0].exp() * (rest[0] - rest[1])
    assert torch.allclose(divergences, expected, atol=1e-5)
    if count == VOCABULARY - 1:
        assert torch.allclose(divergences, (full.exp() * (full - student)).sum(1), atol=1e-5)
    divergences.sum().backward()
    expected.sum().backward()
    assert torch.allclose(chunked.grad, unchunked.grad, atol=1e-4)

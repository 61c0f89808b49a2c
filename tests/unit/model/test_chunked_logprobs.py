"""Log-probabilities of target tokens, computed in chunks."""

import pytest
import torch

from trimtab.model import chunked_logprobs
from trimtab.model.chunked_logprobs import compute_token_logprobs

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

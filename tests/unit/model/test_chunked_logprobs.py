"""Log-probabilities of target tokens, a few at a time."""

import pytest
import torch

from trimtab.model import chunked_logprobs
from trimtab.model.chunked_logprobs import compute_token_logprobs

VOCABULARY = 96


@pytest.fixture
def case():
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, 16, dtype=torch.float64)
    sizes: list[int] = []

    def head(states):
        sizes.append(len(states))
        # Capped, as Gemma's is: the head need not be linear.
        return torch.tanh(states @ weight.T / 5) * 5

    return head, torch.randn(23, 16, dtype=torch.float64), torch.randint(0, VOCABULARY, (23,)), sizes


@pytest.mark.parametrize("rows", [1, 4, 23, 100])
def test_values_and_gradients_are_those_of_all_logits_at_once(case, monkeypatch, rows):
    head, states, tokens, sizes = case
    monkeypatch.setattr(chunked_logprobs, "CPU_BYTES", rows * VOCABULARY * 4)
    weights = torch.rand(23, dtype=torch.float64)
    ours, plain = states.clone().requires_grad_(), states.clone().requires_grad_()
    logp = compute_token_logprobs(head, ours * 2, tokens, VOCABULARY)
    assert max(sizes) <= rows
    assert sum(sizes) == 23
    wanted = head(plain * 2).log_softmax(-1)[torch.arange(23), tokens]
    assert torch.allclose(logp, wanted)
    # A loss that is not linear in them, as a focal weight makes it.
    (weights * logp.exp() * logp).sum().backward()
    (weights * wanted.exp() * wanted).sum().backward()
    assert torch.allclose(ours.grad, plain.grad)


def test_without_a_gradient_none_is_computed(case):
    head, states, tokens, _ = case
    with torch.no_grad():
        logp = compute_token_logprobs(head, states, tokens, VOCABULARY)
    assert not logp.requires_grad
    assert torch.allclose(logp, head(states).log_softmax(-1)[torch.arange(23), tokens])

"""Objectives against their equations, and the training step against a plain one."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from trimtab import chat, objectives
from trimtab.data.rows import Prompt
from trimtab.errors import NotFoundError, UsageError
from trimtab.objectives import Scores
from trimtab.objectives.likelihood import Likelihood
from trimtab.objectives.sta import Sta
from trimtab.steering import Example, compute, example, micro_batches, share


@pytest.fixture
def scores():
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return Scores((-torch.rand(3, 4) * 3).requires_grad_(), mask, torch.tensor([0.1, 0.2, 0.0]))


def test_likelihood_is_mean_cross_entropy(scores):
    for i, length in enumerate((4, 2, 3)):
        assert Likelihood()(scores)[i].item() == pytest.approx(-scores.logp[i, :length].mean().item(), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_sta_sequence_level(scores, gamma):
    loss = Sta(gamma=gamma, beta=0.3)(scores)
    for i, length in enumerate((4, 2, 3)):
        nll = -scores.logp[i, :length].mean()
        wanted = (1 - torch.exp(-nll)) ** gamma * nll + 0.3 * scores.drift[i]
        assert loss[i].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_sta_token_level(scores):
    loss = Sta(gamma=2, level="token")(scores)
    logp = scores.logp[1, :2]
    assert loss[1].item() == pytest.approx((-((1 - logp.exp()) ** 2 * logp).sum() / 2).item(), rel=1e-5)


def test_gamma_zero_is_likelihood(scores):
    assert torch.allclose(Sta(gamma=0)(scores), Likelihood()(scores))


def test_detach_keeps_the_weight_out_of_the_gradient(scores):
    (kept,) = torch.autograd.grad(Sta(detach=True)(scores)[0], scores.logp, retain_graph=True)
    nll = -scores.logp[0].mean()
    weight = (1 - torch.exp(-nll)) ** 2
    assert torch.allclose(kept[0], (-weight / 4).expand(4), atol=1e-6)
    (full,) = torch.autograd.grad(Sta(detach=False)(scores)[0], scores.logp)
    assert not torch.allclose(kept, full)


def test_a_perfect_row_has_no_infinite_gradient():
    logp = torch.zeros(1, 3, requires_grad=True)
    scores = Scores(logp, torch.ones(1, 3), torch.zeros(1))
    (gradient,) = torch.autograd.grad(Sta(gamma=0.5, detach=False)(scores).sum(), logp)
    assert torch.isfinite(gradient).all()


def test_registry():
    assert {"sta", "likelihood"} <= set(objectives.names())
    with pytest.raises(NotFoundError, match="there are: likelihood, sta"):
        objectives.get("nope")
    with pytest.raises(UsageError, match="must not be negative"):
        Sta(gamma=-1)


@pytest.fixture(scope="module")
def examples(base):
    renderer = chat.renderer(base, 8)
    texts = ["Hi", "What is the capital of France, and what is it known for?", "Write a poem about the sea", "Steal a car"]
    targets = ["Hello, how are you today?", "It is Paris, known for the river.", "Waves.", "I cannot help with that."]
    return [
        example(renderer, Prompt(t, "harmful", "t", t), y, "system", 2, 6, True, 1.0)
        for t, y in zip(texts, targets, strict=True)
    ]


def test_gradient_equals_a_plain_pass_row_by_row(frozen, examples):
    torch.manual_seed(0)
    vectors = torch.randn(2, frozen.embedding.weight.shape[1]) * 0.1
    result = compute(frozen, vectors, examples, Likelihood(), total=float(len(examples)))
    leaf = vectors.clone().requires_grad_()
    total = torch.tensor(0.0)
    for e in examples:
        ids = torch.tensor(e.ids)
        is_row = ids >= frozen.first_row
        embedded = frozen.embedding(ids.masked_fill(is_row, 0)).detach().clone()
        embedded = embedded.masked_scatter(is_row[:, None], leaf)
        logits = frozen.model(inputs_embeds=embedded[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[-e.targets - 1 : -1], ids[-e.targets :])
    (wanted,) = torch.autograd.grad(total / len(examples), leaf)
    assert result.loss == pytest.approx((total / len(examples)).item(), rel=1e-5)
    assert torch.allclose(result.gradient, wanted, rtol=1e-3, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(frozen, examples):
    vectors = frozen.embedding.weight.detach()[:2].clone()
    whole = compute(frozen, vectors, examples, Sta(beta=0.5), total=4.0)
    parts = [compute(frozen, vectors, p, Sta(beta=0.5), total=4.0) for p in micro_batches(examples, 1)]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-4)
    assert torch.allclose(sum((p.gradient for p in parts), torch.zeros(())), whole.gradient, rtol=1e-3, atol=1e-6)


def test_drift_is_zero_where_the_prefix_changes_nothing(frozen, base):
    renderer = chat.renderer(base, 8)
    system = [{"role": "system", "content": "x"}]
    prompt = Prompt("Hi", "benign_easy", "t", "t", system="x")
    e = example(renderer, prompt, "Hello there, friend.", "user", 1, 8, True, 1.0)
    # A row that repeats the token it follows is no change of kind, but it does change the answer: drift is above zero.
    vectors = frozen.embedding.weight.detach()[renderer.prompt(system)[:1]]
    changed = compute(frozen, vectors, [e], Sta(gamma=0, beta=1.0), total=1.0).loss
    plain = compute(frozen, vectors, [e], Sta(gamma=0, beta=0.0), total=1.0).loss
    assert changed > plain
    assert e.reference is not None
    same = Example(e.reference, e.targets, e.label, 1.0, e.reference)
    assert compute_drift(frozen, same) == pytest.approx(0.0, abs=1e-5)


def compute_drift(frozen, e):
    from trimtab.steering import score

    return score(frozen, None, [e], drift=True).drift.item()


def test_every_micro_batch_has_one_worker(examples):
    parts = micro_batches(examples * 4, 2)
    for workers in (1, 2, 3, 8):
        shares = [share(parts, rank, workers) for rank in range(workers)]
        assert sorted(i for s in shares for i in s) == list(range(8))

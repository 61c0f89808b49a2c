"""Objectives against their equations, and the training step against a plain one."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.factories import installed
from trimtab import objectives
from trimtab.data.prompt import Prompt
from trimtab.errors import NotFoundError, UsageError
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import (
    FrozenModel,
    TrainingExample,
    select_worker_share,
    split_into_micro_batches,
    tokenize_sample,
)
from trimtab.model.objective_inputs import ObjectiveScorer, collect_openers, compute_totals
from trimtab.objectives import Scores
from trimtab.objectives.bco import Bco
from trimtab.objectives.dpo import Dpo
from trimtab.objectives.dro import Dro
from trimtab.objectives.likelihood import Likelihood
from trimtab.objectives.oxa import Oxa
from trimtab.objectives.poft import Poft
from trimtab.objectives.sta import Sta
from trimtab.objectives.t3s import T3s


@pytest.fixture(scope="module")
def frozen(small):
    return FrozenModel(small.load("fp32"), build_renderer(small, 8).first_slot)


@pytest.fixture
def scores():
    """Three rows of 4, 2 and 3 target tokens; rejected answers of 2, 3 and 1."""
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    rejected_mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]])
    return Scores(
        logp=(-torch.rand(3, 4) * 3).requires_grad_(),
        mask=mask,
        harmful=torch.tensor([True, False, False]),
        reference=-torch.rand(3, 4) * 3,
        drift=torch.tensor([0.1, 0.2, 0.0]),
        rejected_logp=-torch.rand(3, 3) * 2,
        rejected_mask=rejected_mask,
        rejected_reference=-torch.rand(3, 3) * 2,
        odds=torch.tensor([2.0, 1.0, -3.0]),
        running=torch.tensor([4.0, -2.0, 10.0]),
    )


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


def test_sta_decision_level(scores):
    loss = Sta(gamma=2, level="decision")(scores)
    # The first row is harmful and likely to be refused; the second is benign and likely to be refused too.
    for i, right in ((0, 2.0), (1, -1.0), (2, 3.0)):
        p = 1 / (1 + math.exp(-right))
        assert loss[i].item() == pytest.approx((1 - p) ** 2 * scores.nll[i].item(), rel=1e-5)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sums(scores: Scores, i: int) -> tuple[float, float]:
    """Gains in log-probability of the wanted and of the rejected answer of a row."""
    n, r = int(scores.mask[i].sum()), int(scores.rejected_mask[i].sum())
    wanted = (scores.logp - scores.reference)[i, :n].sum().item()
    return wanted, (scores.rejected_logp - scores.rejected_reference)[i, :r].sum().item()


def test_dpo(scores):
    loss = Dpo(beta=0.3, likelihood=0.5)(scores)
    for i in range(3):
        wanted, rejected = sums(scores, i)
        expected = -log_sigmoid(0.3 * (wanted - rejected)) + 0.5 * scores.nll[i].item()
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_bco_and_its_running_means(scores):
    objective = Bco(beta=0.2, decay=0.5)
    delta = (4.0 - 2.0) / 2 / 10.0
    loss = objective(scores)
    for i in range(3):
        wanted, rejected = sums(scores, i)
        expected = -log_sigmoid(0.2 * wanted - delta) - log_sigmoid(-(0.2 * rejected - delta))
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)
    observed = objective.observe(scores)
    assert observed[0].item() == pytest.approx(0.2 * sum(sums(scores, i)[0] for i in range(3)), rel=1e-5)
    assert observed[2].item() == 3
    assert torch.allclose(objective.track(scores.running, observed), (scores.running + observed) / 2)


def test_poft(scores):
    loss = Poft(beta=2.0)(scores)
    for i, length in enumerate((4, 2, 3)):
        gain = (scores.logp - scores.reference)[i, :length].mean().item()
        assert loss[i].item() == pytest.approx(-log_sigmoid(2 * gain), rel=1e-5)


def test_oxa(scores):
    loss = Oxa(gamma=1.0, push=0.5)(scores)
    for i, length in enumerate((2, 3, 1)):
        p = math.exp(-scores.nll[i].item())
        wrong = math.exp(scores.rejected_logp[i, :length].mean().item())
        expected = (1 - p) * scores.nll[i].item() + 0.5 * wrong * -math.log(1 - wrong)
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_t3s_learns_only_what_the_first_pass_did_not(scores):
    assert torch.allclose(T3s()(scores), scores.nll), "no anchor yet"
    rise = torch.tensor([[1.0, 0.2, 0.9, -1], [0.9, 0.9, 0, 0], [0, 0, 0, 0]])
    after = replace(scores, anchor=scores.reference + rise)
    loss = T3s(threshold=0.5)(after)
    assert loss[0].item() == pytest.approx(-(scores.logp[0, 1] + scores.logp[0, 3]).item() / 2, rel=1e-5)
    assert loss[1].item() == 0.0, "a row that is learned already"
    assert loss[2].item() == pytest.approx(scores.nll[2].item(), rel=1e-5)


def test_dro_moves_refusal_and_leaves_harmfulness():
    """States of two dimensions that matter: the first holds refusal, the second harmfulness."""
    torch.manual_seed(0)
    states = torch.randn(400, 8) * torch.tensor([5.0, 4, 3, 2, 0.1, 0.1, 0.1, 0.1])
    objective = Dro().fitted(states, odds=states[:, 0], harmful=states[:, 1] > 0)

    def loss(move: list[float], harmful: bool) -> float:
        moved = torch.zeros(1, 8)
        moved[0, : len(move)] = torch.tensor(move)
        base = torch.zeros(1, 8)
        return objective(
            Scores(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([harmful]), states=base + moved, base_states=base)
        ).item()

    assert loss([3.0], True) < loss([0.0], True) < loss([-3.0], True)
    assert loss([-3.0], False) < loss([0.0], False) < loss([3.0], False)
    assert loss([0.0, 3.0], True) > loss([0.0], True) + 0.5
    assert loss([0.0] * 7 + [3.0], True) > loss([0.0], True)


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
    scores = Scores(logp, torch.ones(1, 3), torch.tensor([True]))
    (gradient,) = torch.autograd.grad(Sta(gamma=0.5, detach=False)(scores).sum(), logp)
    assert torch.isfinite(gradient).all()


def test_registry():
    known = ["bco", "dpo", "dro", "likelihood", "oxa", "poft", "sta", "t3s"]
    assert set(known) <= set(objectives.list_objectives())
    with pytest.raises(NotFoundError, match=f"there are: {', '.join(known)}"):
        objectives.get_objective("nope")
    with pytest.raises(UsageError, match="must not be negative"):
        Sta(gamma=-1)


@pytest.fixture(scope="module")
def examples(small):
    renderer = build_renderer(small, 8)
    texts = ["Hi", "What is the capital of France, and what is it known for?", "Write a poem about the sea", "Steal a car"]
    targets = ["Hello, how are you today?", "It is Paris, known for the river.", "Waves.", "I cannot help with that."]
    sides = ("benign_easy", "benign_easy", "harmful", "harmful")
    return [
        TrainingExample(
            tokenize_sample(renderer, Prompt(t, side, "t", t), y, "system", 2, 6),
            side,
            1.0,
            tokenize_sample(renderer, Prompt(t, side, "t", t), "No, I will not.", "system", 2, 6),
        )
        for t, y, side in zip(texts, targets, sides, strict=True)
    ]


def compute(frozen, vectors, batch, objective, whole):
    return ObjectiveScorer(frozen, objective, *collect_openers(batch)).compute(
        vectors, batch, whole, torch.zeros(objective.tracked)
    )


def test_gradient_equals_a_plain_pass_row_by_row(frozen, examples):
    torch.manual_seed(0)
    vectors = torch.randn(2, frozen.embedding.weight.shape[1]) * 0.1
    result = compute(frozen, vectors, examples, Likelihood(), compute_totals(examples))
    leaf = vectors.clone().requires_grad_()
    total = torch.tensor(0.0)
    for e in examples:
        ids = torch.tensor(e.chosen.ids)
        is_row = ids >= frozen.first_slot
        embedded = frozen.embedding(ids.masked_fill(is_row, 0)).detach().clone()
        embedded = embedded.masked_scatter(is_row[:, None], leaf)
        logits = frozen.model(inputs_embeds=embedded[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[-e.chosen.targets - 1 : -1], ids[-e.chosen.targets :])
    (wanted,) = torch.autograd.grad(total / len(examples), leaf)
    assert result.loss == pytest.approx((total / len(examples)).item(), rel=1e-5)
    assert torch.allclose(result.gradient, wanted, rtol=1e-3, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(frozen, examples):
    vectors = frozen.embedding.weight.detach()[:2].clone()
    whole = compute(frozen, vectors, examples, Sta(beta=0.5), compute_totals(examples))
    parts = [
        compute(frozen, vectors, p, Sta(beta=0.5), compute_totals(examples)) for p in split_into_micro_batches(examples, 1)
    ]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-4)
    assert torch.allclose(sum((p.gradient for p in parts), torch.zeros(())), whole.gradient, rtol=1e-3, atol=1e-6)


EVERY = [Sta(beta=0.5), Sta(level="decision"), Dpo(), Bco(), Poft(), Oxa(), T3s(), Dro()]


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_every_objective_gives_one_gradient_however_the_batch_is_cut(frozen, examples, objective):
    vectors = frozen.embedding.weight.detach()[:2].clone()
    scorer = ObjectiveScorer(frozen, objective, *collect_openers(examples))
    if "states" in objective.needs:
        plain = [scorer.get_base_outputs(e.chosen) for e in examples]
        states, odds = torch.stack([p.state for p in plain]), torch.stack([p.odds for p in plain])
        scorer.objective = objective.fitted(states, odds, torch.tensor([e.label == "harmful" for e in examples]))
    running = torch.ones(objective.tracked)
    whole = scorer.compute(vectors, examples, compute_totals(examples), running, anchor=vectors * 1.1)
    parts = [
        scorer.compute(vectors, p, compute_totals(examples), running, anchor=vectors * 1.1)
        for p in split_into_micro_batches(examples, 1)
    ]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-4)
    assert whole.gradient.norm() > 0
    gradient = sum((p.gradient for p in parts), torch.zeros(()))
    assert (gradient - whole.gradient).norm() < 1e-3 * whole.gradient.norm()
    assert torch.allclose(sum((p.observed for p in parts), torch.zeros(())), whole.observed, rtol=1e-4)


def test_drift_is_zero_where_the_prefix_changes_nothing(frozen, small):
    renderer = build_renderer(small, 8)
    prompt = Prompt("Hi", "benign_easy", "t", "t", system="x")
    e = TrainingExample(tokenize_sample(renderer, prompt, "Hello there, friend.", "user", 1, 8), "benign_easy")
    scorer = ObjectiveScorer(frozen, Sta(gamma=0, beta=1.0))
    vectors = frozen.embedding.weight.detach()[e.chosen.plain[:1],]
    assert scorer.compute_scores(vectors, [e], torch.empty(0)).drift.item() > 0
    same = TrainingExample(replace(e.chosen, ids=e.chosen.plain), e.label)
    assert scorer.compute_scores(None, [same], torch.empty(0)).drift.item() == pytest.approx(0.0, abs=1e-5)


def test_drift_is_the_mean_over_the_tokens_of_plain_rows_whatever_else_is_in_the_batch(frozen, examples):
    vectors = frozen.embedding.weight.detach()[:2].clone()
    whole = examples[0].chosen
    short = replace(examples[0], chosen=replace(whole, ids=whole.ids[:-3], plain=whole.plain[:-3], targets=whole.targets - 3))
    easy = [short, examples[1]]
    kl = []
    with torch.no_grad():
        for e in easy:
            base = frozen.target_logits(None, [e.chosen.plain], [e.chosen.targets]).log_softmax(-1)
            ours = frozen.target_logits(vectors, [e.chosen.ids], [e.chosen.targets]).log_softmax(-1)
            kl.append((base.exp() * (base - ours)).sum(-1))
    wanted = torch.cat(kl).mean().item()
    assert len({len(tokens) for tokens in kl}) > 1, "rows of one length would not tell tokens from rows"
    for weight in (1.0, 3.0):
        batch = [*(replace(e, weight=weight) for e in easy), *examples[2:]]
        with_drift, without = (compute(frozen, vectors, batch, Sta(beta=b), compute_totals(batch)).loss for b in (1.0, 0.0))
        assert with_drift - without == pytest.approx(wanted, rel=1e-3)


def test_a_row_of_twice_the_weight_counts_as_two(frozen, examples):
    vectors = frozen.embedding.weight.detach()[:2].clone()
    heavy = [replace(examples[0], weight=2.0), *examples[1:]]
    doubled = [examples[0], *examples]
    one, two = (compute(frozen, vectors, batch, Sta(), compute_totals(batch)) for batch in (heavy, doubled))
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert torch.allclose(one.gradient, two.gradient, rtol=1e-3, atol=1e-6)


OUTSIDE = """
from dataclasses import dataclass
from trimtab.objectives import Objective, register


@register("twice")
@dataclass(frozen=True)
class Twice(Objective):
    factor: float = 2.0

    def __call__(self, scores):
        return self.factor * scores.nll
"""


def test_another_package_registers_an_objective(tmp_path, monkeypatch, scores):
    installed(tmp_path, "twice", OUTSIDE, "trimtab.objectives")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "twice" in objectives.list_objectives()
    assert torch.allclose(objectives.get_objective("twice")()(scores), 2 * scores.nll)


def test_every_micro_batch_has_one_worker(examples):
    parts = split_into_micro_batches(examples * 4, 2)
    for workers in (1, 2, 3, 8):
        shares = [select_worker_share(parts, rank, workers) for rank in range(workers)]
        assert sorted(i for s in shares for i in s) == list(range(8))

"""Objectives against their equations, and gradients of a batch against a computation by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.factories import install_package
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
from trimtab.model.reference_outputs import ReferenceOutputs
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
def tiny_frozen(tiny_base):
    return FrozenModel(tiny_base.load("fp32"), build_renderer(tiny_base, 8).first_slot)


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
        expected = (1 - torch.exp(-nll)) ** gamma * nll + 0.3 * scores.drift[i]
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_sta_token_level(scores):
    loss = Sta(gamma=2, level="token")(scores)
    logp = scores.logp[1, :2]
    assert loss[1].item() == pytest.approx((-((1 - logp.exp()) ** 2 * logp).sum() / 2).item(), rel=1e-5)


def test_sta_decision_level(scores):
    loss = Sta(gamma=2, level="decision")(scores)
    # Log-odds of the right decision. Row 1 is benign but likely to be refused, so that its log-odds are negative.
    for i, log_odds in ((0, 2.0), (1, -1.0), (2, 3.0)):
        p = 1 / (1 + math.exp(-log_odds))
        assert loss[i].item() == pytest.approx((1 - p) ** 2 * scores.nll[i].item(), rel=1e-5)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def compute_gains(scores: Scores, i: int) -> tuple[float, float]:
    """Compute the gains in log-probability of the chosen and of the rejected answer of a row."""
    chosen_length, rejected_length = int(scores.mask[i].sum()), int(scores.rejected_mask[i].sum())
    chosen = (scores.logp - scores.reference)[i, :chosen_length].sum().item()
    return chosen, (scores.rejected_logp - scores.rejected_reference)[i, :rejected_length].sum().item()


def test_dpo(scores):
    loss = Dpo(beta=0.3, likelihood=0.5)(scores)
    for i in range(3):
        chosen, rejected = compute_gains(scores, i)
        expected = -log_sigmoid(0.3 * (chosen - rejected)) + 0.5 * scores.nll[i].item()
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_bco_and_its_running_means(scores):
    objective = Bco(beta=0.2, decay=0.5)
    delta = (4.0 - 2.0) / 2 / 10.0
    loss = objective(scores)
    for i in range(3):
        chosen, rejected = compute_gains(scores, i)
        expected = -log_sigmoid(0.2 * chosen - delta) - log_sigmoid(-(0.2 * rejected - delta))
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)
    observed = objective.observe(scores)
    assert observed[0].item() == pytest.approx(0.2 * sum(compute_gains(scores, i)[0] for i in range(3)), rel=1e-5)
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


def test_t3s_skips_tokens_learned_in_first_pass(scores):
    assert torch.allclose(T3s()(scores), scores.nll), "without an anchor, T3S is the likelihood"
    rise = torch.tensor([[1.0, 0.2, 0.9, -1], [0.9, 0.9, 0, 0], [0, 0, 0, 0]])
    anchored = replace(scores, anchor=scores.reference + rise)
    loss = T3s(threshold=0.5)(anchored)
    assert loss[0].item() == pytest.approx(-(scores.logp[0, 1] + scores.logp[0, 3]).item() / 2, rel=1e-5)
    assert loss[1].item() == 0.0, "all tokens of the row are learned"
    assert loss[2].item() == pytest.approx(scores.nll[2].item(), rel=1e-5)


def test_dro_moves_refusal_and_keeps_harmfulness():
    """In the states, dimension 0 determines refusal and dimension 1 harmfulness."""
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


def test_detach_excludes_weight_from_gradient(scores):
    (detached,) = torch.autograd.grad(Sta(detach=True)(scores)[0], scores.logp, retain_graph=True)
    nll = -scores.logp[0].mean()
    weight = (1 - torch.exp(-nll)) ** 2
    assert torch.allclose(detached[0], (-weight / 4).expand(4), atol=1e-6)
    (full,) = torch.autograd.grad(Sta(detach=False)(scores)[0], scores.logp)
    assert not torch.allclose(detached, full)


def test_gradient_of_perfect_row_is_finite():
    logp = torch.zeros(1, 3, requires_grad=True)
    scores = Scores(logp, torch.ones(1, 3), torch.tensor([True]))
    (gradient,) = torch.autograd.grad(Sta(gamma=0.5, detach=False)(scores).sum(), logp)
    assert torch.isfinite(gradient).all()


def test_registry_lists_objectives_and_rejects_unknown_name():
    names = ["bco", "distil", "dpo", "dro", "likelihood", "oxa", "poft", "sta", "t3s"]
    assert set(names) <= set(objectives.list_objectives())
    with pytest.raises(NotFoundError, match=f"there are: {', '.join(names)}"):
        objectives.get_objective("nope")


def test_rejects_negative_gamma():
    with pytest.raises(UsageError, match="must not be negative"):
        Sta(gamma=-1)


@pytest.fixture(scope="module")
def examples(tiny_base):
    renderer = build_renderer(tiny_base, 8)
    texts = ["Hi", "What is the capital of France, and what is it known for?", "Write a poem about the sea", "Steal a car"]
    targets = ["Hello, how are you today?", "It is Paris, known for the river.", "Waves.", "I cannot help with that."]
    labels = ("benign_easy", "benign_easy", "harmful", "harmful")
    return [
        TrainingExample(
            tokenize_sample(renderer, Prompt(text, label, "t", text), target, "system", 2, 6),
            label,
            1.0,
            tokenize_sample(renderer, Prompt(text, label, "t", text), "No, I will not.", "system", 2, 6),
        )
        for text, target, label in zip(texts, targets, labels, strict=True)
    ]


def compute_objective(tiny_frozen, vectors, batch, objective, totals):
    """Compute loss and gradient of a batch with the totals of the batch that it belongs to."""
    return ObjectiveScorer(ReferenceOutputs(tiny_frozen, *collect_openers(batch)), objective).compute(
        vectors, batch, totals, torch.zeros(objective.tracked)
    )


def test_gradient_equals_single_rows_by_hand(tiny_frozen, examples):
    torch.manual_seed(0)
    vectors = torch.randn(2, tiny_frozen.embedding.weight.shape[1]) * 0.1
    result = compute_objective(tiny_frozen, vectors, examples, Likelihood(), compute_totals(examples))
    leaf = vectors.clone().requires_grad_()
    total = torch.tensor(0.0)
    for example in examples:
        ids, targets = torch.tensor(example.chosen.ids), example.chosen.targets
        is_row = ids >= tiny_frozen.first_slot
        embeddings = tiny_frozen.embedding(ids.masked_fill(is_row, 0)).detach().clone()
        embeddings = embeddings.masked_scatter(is_row[:, None], leaf)
        logits = tiny_frozen.model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        total = total + cross_entropy(logits[-targets - 1 : -1], ids[-targets:])
    (expected,) = torch.autograd.grad(total / len(examples), leaf)
    assert result.loss == pytest.approx((total / len(examples)).item(), rel=1e-5)
    assert torch.allclose(result.gradient, expected, rtol=1e-3, atol=1e-6)


def test_micro_batches_sum_to_batch(tiny_frozen, examples):
    vectors = tiny_frozen.embedding.weight.detach()[:2].clone()
    totals = compute_totals(examples)
    batch = compute_objective(tiny_frozen, vectors, examples, Sta(beta=0.5), totals)
    parts = [
        compute_objective(tiny_frozen, vectors, micro_batch, Sta(beta=0.5), totals)
        for micro_batch in split_into_micro_batches(examples, 1)
    ]
    assert sum(part.loss for part in parts) == pytest.approx(batch.loss, rel=1e-4)
    assert torch.allclose(sum((part.gradient for part in parts), torch.zeros(())), batch.gradient, rtol=1e-3, atol=1e-6)


OBJECTIVES = [Sta(beta=0.5), Sta(level="decision"), Dpo(), Bco(), Poft(), Oxa(), T3s(), Dro()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_objective_does_not_depend_on_micro_batches(tiny_frozen, examples, objective):
    vectors = tiny_frozen.embedding.weight.detach()[:2].clone()
    scorer = ObjectiveScorer(ReferenceOutputs(tiny_frozen, *collect_openers(examples)), objective)
    if "states" in objective.needs:
        outputs = [scorer.references.get_base_outputs(example.chosen) for example in examples]
        states, odds = torch.stack([output.state for output in outputs]), torch.stack([output.odds for output in outputs])
        harmful = torch.tensor([example.label == "harmful" for example in examples])
        scorer.objective = objective.fitted(states, odds, harmful)
    running, totals, anchor = torch.ones(objective.tracked), compute_totals(examples), vectors * 1.1
    batch = scorer.compute(vectors, examples, totals, running, anchor=anchor)
    parts = [
        scorer.compute(vectors, micro_batch, totals, running, anchor=anchor)
        for micro_batch in split_into_micro_batches(examples, 1)
    ]
    assert sum(part.loss for part in parts) == pytest.approx(batch.loss, rel=1e-4)
    assert batch.gradient.norm() > 0
    gradient = sum((part.gradient for part in parts), torch.zeros(()))
    assert (gradient - batch.gradient).norm() < 1e-3 * batch.gradient.norm()
    assert torch.allclose(sum((part.observed for part in parts), torch.zeros(())), batch.observed, rtol=1e-4)


def test_drift_is_zero_without_effect_of_prefix(tiny_frozen, tiny_base):
    renderer = build_renderer(tiny_base, 8)
    prompt = Prompt("Hi", "benign_easy", "t", "t", system="x")
    example = TrainingExample(tokenize_sample(renderer, prompt, "Hello there, friend.", "user", 1, 8), "benign_easy")
    scorer = ObjectiveScorer(ReferenceOutputs(tiny_frozen), Sta(gamma=0, beta=1.0))
    vectors = tiny_frozen.embedding.weight.detach()[example.chosen.plain[:1],]
    assert scorer.compute_scores(vectors, [example], torch.empty(0)).drift.item() > 0
    without_prefix = TrainingExample(replace(example.chosen, ids=example.chosen.plain), example.label)
    assert scorer.compute_scores(None, [without_prefix], torch.empty(0)).drift.item() == pytest.approx(0.0, abs=1e-5)


def test_drift_is_token_mean_over_easy_benign_rows(tiny_frozen, examples):
    """Neither harmful rows in the batch nor the weights of rows change the drift."""
    vectors = tiny_frozen.embedding.weight.detach()[:2].clone()
    chosen = examples[0].chosen
    shortened = replace(chosen, ids=chosen.ids[:-3], plain=chosen.plain[:-3], targets=chosen.targets - 3)
    easy = [replace(examples[0], chosen=shortened), examples[1]]
    divergences = []
    with torch.no_grad():
        for example in easy:
            base = tiny_frozen.target_logits(None, [example.chosen.plain], [example.chosen.targets]).log_softmax(-1)
            steered = tiny_frozen.target_logits(vectors, [example.chosen.ids], [example.chosen.targets]).log_softmax(-1)
            divergences.append((base.exp() * (base - steered)).sum(-1))
    expected = torch.cat(divergences).mean().item()
    assert len({len(tokens) for tokens in divergences}) > 1, "rows of equal length cannot tell a token mean from a row mean"
    for weight in (1.0, 3.0):
        batch = [*(replace(example, weight=weight) for example in easy), *examples[2:]]
        with_drift, without_drift = (
            compute_objective(tiny_frozen, vectors, batch, Sta(beta=beta), compute_totals(batch)).loss for beta in (1.0, 0.0)
        )
        assert with_drift - without_drift == pytest.approx(expected, rel=1e-3)


def test_row_of_weight_two_counts_as_two_rows(tiny_frozen, examples):
    vectors = tiny_frozen.embedding.weight.detach()[:2].clone()
    batches = ([replace(examples[0], weight=2.0), *examples[1:]], [examples[0], *examples])
    weighted, doubled = (compute_objective(tiny_frozen, vectors, batch, Sta(), compute_totals(batch)) for batch in batches)
    assert weighted.loss == pytest.approx(doubled.loss, rel=1e-5)
    assert torch.allclose(weighted.gradient, doubled.gradient, rtol=1e-3, atol=1e-6)


PACKAGE_SOURCE = """
from dataclasses import dataclass
from trimtab.objectives import Objective, register


@register("twice")
@dataclass(frozen=True)
class Twice(Objective):
    factor: float = 2.0

    def __call__(self, scores):
        return self.factor * scores.nll
"""


def test_other_package_registers_objective(tmp_path, monkeypatch, scores):
    install_package(tmp_path, "twice", PACKAGE_SOURCE, "trimtab.objectives")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "twice" in objectives.list_objectives()
    assert torch.allclose(objectives.get_objective("twice")()(scores), 2 * scores.nll)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_micro_batch_has_one_worker(examples, workers):
    micro_batches = split_into_micro_batches(examples * 4, 2)
    shares = [select_worker_share(micro_batches, rank, workers) for rank in range(workers)]
    assert sorted(index for share in shares for index in share) == list(range(8))

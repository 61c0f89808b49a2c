"""Distillation of a system prompt: the teacher, the divergence from it, and the vectors that it starts from."""

import pytest
import torch

from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.jobs.align.config import AlignConfig, ConditionConfig, TrainConfig
from trimtab.jobs.align.state import build_initial_vectors
from trimtab.jobs.align.step import build_example
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives.distil import Distil

SYSTEM = "Answer in rhyme, and never use the letter e."
TEXTS = ("What is a lake?", "Name three birds that cannot fly.")


@pytest.fixture(scope="module")
def system_ids(tiny_base):
    return tiny_base.tokenizer().encode(SYSTEM, add_special_tokens=False)


@pytest.fixture(scope="module")
def scorer(tiny_base, system_ids):
    renderer = build_renderer(tiny_base, len(system_ids))
    frozen = FrozenModel(tiny_base.load("fp32"), renderer.first_slot)
    frozen.enable_prefix_tree()
    return ObjectiveScorer(ReferenceOutputs(frozen), Distil())


def build_config(rows, init="teacher"):
    train = TrainConfig(init=init, max_target_tokens=8, dtype="fp32")
    return AlignConfig(num_virtual_tokens=rows, objective="distil", train=train, condition=ConditionConfig(None))


@pytest.fixture(scope="module")
def examples(tiny_base, system_ids):
    renderer = build_renderer(tiny_base, len(system_ids))
    rows = [
        TrainingRow(Prompt(text, "benign_easy", "t", text), "Of course, it is.", 8, teacher_system=SYSTEM) for text in TEXTS
    ]
    return [build_example(renderer, row, build_config(len(system_ids))) for row in rows]


def test_embeddings_of_the_system_prompt_have_no_divergence(tiny_base, scorer, examples, system_ids):
    renderer = build_renderer(tiny_base, len(system_ids))
    vectors = build_initial_vectors(scorer.frozen, build_config(len(system_ids)), renderer, SYSTEM)
    assert torch.equal(vectors, scorer.frozen.embedding.weight[system_ids].float())
    scores = scorer.compute_scores(vectors, examples, torch.empty(0))
    assert scores.mean_divergence.abs().max() < 1e-4


def test_a_gradient_step_reduces_the_divergence(scorer, examples, system_ids):
    torch.manual_seed(0)
    vectors = 0.3 * torch.randn(len(system_ids), scorer.frozen.embedding.weight.shape[1])
    before = scorer.compute(vectors, examples, compute_totals(examples), torch.empty(0))
    assert before.loss > 1e-4
    step = 1e-3 * before.gradient / before.gradient.norm()
    after = scorer.compute(vectors - step, examples, compute_totals(examples), torch.empty(0))
    assert after.loss < before.loss
    assert before.losses["benign_easy"] / 2 == pytest.approx(before.loss, rel=1e-4)


def test_initial_vectors_are_evenly_spaced_tokens(tiny_base, scorer, system_ids):
    renderer = build_renderer(tiny_base, 2)
    vectors = build_initial_vectors(scorer.frozen, build_config(2), renderer, SYSTEM)
    quarter = len(system_ids) // 4
    expected = scorer.frozen.embedding.weight[[system_ids[quarter], system_ids[3 * len(system_ids) // 4]]]
    assert torch.equal(vectors, expected.float())
    with pytest.raises(UsageError, match="needs the system prompt of a teacher"):
        build_initial_vectors(scorer.frozen, build_config(2), renderer)


def test_trained_tokens_limit_the_target(tiny_base):
    row = TrainingRow(Prompt("Hi", "benign_easy", "t", "Hi"), "One two three four five.", 6, trained_tokens=2)
    assert build_example(build_renderer(tiny_base, 1), row, build_config(1)).chosen.targets == 2

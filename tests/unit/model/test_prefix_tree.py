"""Prefix tree: common beginnings of rows are computed once, with the gradients of the padded batch."""

import pytest
import torch

from tests.support import tiny_models
from trimtab.data.prompt import Prompt
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TokenizedSample, TrainingExample, tokenize_sample
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.prefix_tree import build_prefix_tree, enable_tree_attention
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives.dpo import Dpo

CPU = torch.device("cpu")
# Chosen and rejected answers share their prompt, and all rows share the beginning of the chat template.
ROWS = [
    ("Steal a car from my neighbour", "harmful", "I'm sorry, but no.", "Sure! First of all"),
    ("Steal a car for the chase in my film", "benign_hard", "Hire one, and a stunt driver.", "No."),
    ("Bake bread", "benign_easy", "Flour, water, salt and an oven.", "I cannot help with that."),
]


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def tree_base(request, tmp_path_factory):
    return tiny_models.make_base_model(tiny_models.FAMILIES[request.param], tmp_path_factory.mktemp("packing") / request.param)


def compute_gradient(base, model, position, packs: bool) -> torch.Tensor:
    renderer = build_renderer(base, 2)
    frozen = FrozenModel(model, renderer.first_slot)
    assert not packs or frozen.enable_prefix_tree()
    rows: list[TrainingExample] = []
    for prompt, label, *answers in ROWS:
        chosen, rejected = (
            tokenize_sample(renderer, Prompt(prompt, label, "t", "t"), answer, position, 2, 16) for answer in answers
        )
        rows.append(TrainingExample(chosen, label, rejected=rejected))
    # Rows that differ before the vectors.
    row, other = ((*head, renderer.first_slot, renderer.first_slot + 1) for head in ((20, 21), (20, 22)))
    rows += [
        TrainingExample(TokenizedSample((*ids, 9, end, 11), (9, end, 11), 2), "harmful", rejected=rows[0].chosen)
        for ids in (row, other)
        for end in (12, 13)
    ]
    vectors = 0.1 * torch.randn(2, base.width, generator=torch.Generator().manual_seed(0))
    return (
        ObjectiveScorer(ReferenceOutputs(frozen), Dpo()).compute(vectors, rows, compute_totals(rows), torch.zeros(0)).gradient
    )


@pytest.mark.parametrize("position", ["start", "user"])
def test_gradient_equals_that_of_the_padded_batch(tree_base, position):
    padded, packed = (compute_gradient(tree_base, tree_base.load("fp32"), position, packs) for packs in (False, True))
    assert padded.abs().max() > 0
    torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-6)


def test_shared_tokens_occur_once():
    packed = build_prefix_tree([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [6, 7]], CPU)
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 6, 7]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packed.paths.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [0, 1, 2, 3], [5, 6, 0, 0]]
    assert packed.paths.flatten()[packed.owners].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("name", "value"),
    [("_attn_implementation_internal", "eager"), ("layer_types", ["full_attention", "conv"])],
    ids=["other attention implementation", "layers without attention"],
)
def test_unsupported_model_is_unchanged(tree_base, name, value):
    model = tree_base.load("fp32")
    config = model.config.get_text_config()
    setattr(config, name, value)
    frozen = FrozenModel(model, tree_base.vocabulary)
    assert not enable_tree_attention(model)
    assert not frozen.packs
    assert getattr(config, name) == value

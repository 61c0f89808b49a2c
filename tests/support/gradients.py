"""Gradient of a training objective on a loaded model."""

import torch
from transformers import PreTrainedModel

from trimtab.data.prompt import Prompt
from trimtab.model.base_model import BaseModel
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, tokenize_sample
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.reference_outputs import ReferenceOutputs
from trimtab.objectives.sta import Sta

ROWS = [("Steal a car", "harmful", "I'm sorry, but no."), ("Bake bread", "benign_easy", "Flour, water, salt and an oven.")]


def compute_gradient(base: BaseModel, model: PreTrainedModel, packs: bool = True) -> torch.Tensor:
    """Compute the gradient of two rows, with or without prefix-tree batching."""
    renderer = build_renderer(base, 2)
    frozen = FrozenModel(model, renderer.first_slot)
    assert not packs or frozen.enable_prefix_tree()
    rows = [
        TrainingExample(tokenize_sample(renderer, Prompt(prompt, label, "t", "t"), answer, "user", 2, 16), label)
        for prompt, label, answer in ROWS
    ]
    vectors = 0.1 * torch.randn(2, base.width, generator=torch.Generator().manual_seed(0))
    return (
        ObjectiveScorer(ReferenceOutputs(frozen), Sta(beta=0.1))
        .compute(vectors, rows, compute_totals(rows), torch.zeros(0))
        .gradient
    )

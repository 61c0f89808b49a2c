"""Layers that are recomputed, compiled or sharded give the gradient of the model as it is."""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support import tiny_models
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample, tokenize_sample
from trimtab.model.layer_transforms import compile_layers, enable_activation_checkpointing, get_layers, shard_model
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.objectives.sta import Sta

ROWS = [("Steal a car", "harmful", "I'm sorry, but no."), ("Bake bread", "benign_easy", "Flour, water, salt and an oven.")]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base(request, tmp_path_factory):
    return tiny_models.make(tiny_models.FAMILIES[request.param], tmp_path_factory.mktemp("layers") / request.param)


@pytest.fixture
def model(base):
    return base.load("fp32")


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["cpu", GPU])
def alone(request, tmp_path):
    """A group of one worker: enough to cut, gather and let go."""
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh(request.param, (1,))
    dist.destroy_process_group()


def gradient(base, model, packs=True) -> torch.Tensor:
    renderer = build_renderer(base, 2)
    frozen = FrozenModel(model, renderer.first_slot)
    assert not packs or frozen.enable_prefix_tree()
    rows = [
        TrainingExample(tokenize_sample(renderer, Prompt(prompt, label, "t", "t"), answer, "user", 2, 16), label)
        for prompt, label, answer in ROWS
    ]
    vectors = 0.1 * torch.randn(2, base.width, generator=torch.Generator().manual_seed(0))
    return ObjectiveScorer(frozen, Sta(beta=0.1)).compute(vectors, rows, compute_totals(rows), torch.zeros(0)).gradient


@pytest.fixture
def plain(base):
    return gradient(base, base.load("fp32"), packs=False)


def test_recomputed_layers(base, model, plain):
    enable_activation_checkpointing(model)
    for packs, wanted in ((False, plain), (True, gradient(base, base.load("fp32")))):
        assert torch.equal(gradient(base, model, packs), wanted)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers(base, model, plain):
    compile_layers(model)
    torch.testing.assert_close(gradient(base, model), plain, rtol=1e-3, atol=1e-5)


def test_sharded_layers(base, model, plain, alone):
    enable_activation_checkpointing(model)
    shard_model(model, alone, torch.device(alone.device_type))
    torch.testing.assert_close(gradient(base, model), plain, rtol=1e-3, atol=1e-5)
    assert all(hasattr(p, "device_mesh") for p in get_layers(model).parameters()), "every layer's weights are cut"
    assert not hasattr(model.get_input_embeddings().weight, "device_mesh")


def test_a_family_without_layers_in_their_place_is_refused(model):
    del model.get_decoder().layers
    with pytest.raises(UsageError, match="has no `layers` in its decoder"):
        enable_activation_checkpointing(model)

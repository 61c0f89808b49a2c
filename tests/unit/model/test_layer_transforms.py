"""Layers that are recomputed, compiled or sharded: their gradients equal those of the plain model."""

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
def layer_base(request, tmp_path_factory):
    return tiny_models.make_base_model(tiny_models.FAMILIES[request.param], tmp_path_factory.mktemp("layers") / request.param)


@pytest.fixture
def layer_model(layer_base):
    return layer_base.load("fp32")


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["cpu", GPU])
def single_worker_mesh(request, tmp_path):
    """Mesh of one worker, which is enough to shard, gather and free weights."""
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh(request.param, (1,))
    dist.destroy_process_group()


def compute_gradient(base, model, packs=True) -> torch.Tensor:
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
def plain_gradient(layer_base):
    return compute_gradient(layer_base, layer_base.load("fp32"), packs=False)


def test_recomputed_layers_give_equal_gradient(layer_base, layer_model, plain_gradient):
    enable_activation_checkpointing(layer_model)
    for packs, expected in ((False, plain_gradient), (True, compute_gradient(layer_base, layer_base.load("fp32")))):
        assert torch.equal(compute_gradient(layer_base, layer_model, packs), expected)


# One family only: compiling takes half a minute.
@pytest.mark.parametrize("layer_base", ["llama"], indirect=True)
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_equal_gradient(layer_base, layer_model, plain_gradient):
    compile_layers(layer_model)
    torch.testing.assert_close(compute_gradient(layer_base, layer_model), plain_gradient, rtol=1e-3, atol=1e-5)


def test_sharded_layers_give_equal_gradient(layer_base, layer_model, plain_gradient, single_worker_mesh):
    enable_activation_checkpointing(layer_model)
    shard_model(layer_model, single_worker_mesh, torch.device(single_worker_mesh.device_type))
    torch.testing.assert_close(compute_gradient(layer_base, layer_model), plain_gradient, rtol=1e-3, atol=1e-5)
    assert all(hasattr(p, "device_mesh") for p in get_layers(layer_model).parameters()), (
        "the weights of every layer must be sharded"
    )
    assert not hasattr(layer_model.get_input_embeddings().weight, "device_mesh")


def test_rejects_decoder_without_layers(layer_model):
    del layer_model.get_decoder().layers
    with pytest.raises(UsageError, match="has no `layers` in its decoder"):
        enable_activation_checkpointing(layer_model)

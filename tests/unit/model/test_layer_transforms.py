"""Layers that are recomputed, compiled or sharded: their gradients equal those of the plain model."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.support import tiny_models
from tests.support.gradients import compute_gradient
from trimtab.errors import UsageError
from trimtab.model.layer_transforms import enable_activation_checkpointing, get_layers, shard_model


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


@pytest.fixture
def plain_gradient(layer_base):
    return compute_gradient(layer_base, layer_base.load("fp32"), packs=False)


def test_recomputed_layers_give_equal_gradient(layer_base, layer_model, plain_gradient):
    enable_activation_checkpointing(layer_model)
    for packs, expected in ((False, plain_gradient), (True, compute_gradient(layer_base, layer_base.load("fp32")))):
        assert torch.equal(compute_gradient(layer_base, layer_model, packs), expected)


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

"""Transformations of a frozen model's layers for training: activation checkpointing, compilation, sharding.

They must be applied in this order: checkpointed layers are compiled, and compiled layers are sharded.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # private, but used by PyTorch's own trainers
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from trimtab.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def get_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """Return the decoder layers of a model.

    Raises:
        UsageError: if the model family stores its layers under another name.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"{type(model).__name__} has no `layers` in its decoder: activation_checkpointing, compile and "
            "fsdp are not available"
        )
    return layers


def enable_activation_checkpointing(model: "PreTrainedModel") -> None:
    """Store only the input of each layer, and recompute the rest in the backward pass."""
    layers = get_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, CheckpointImpl.NO_REENTRANT)


def compile_layers(model: "PreTrainedModel") -> None:
    """Compile each layer separately.

    The layers share one compiled graph, so that compilation takes seconds instead of minutes for the whole model.
    """
    for layer in get_layers(model):
        layer.compile(dynamic=True)


def shard_model(model: "PreTrainedModel", mesh: DeviceMesh, device: torch.device) -> None:
    """Shard the layers' weights over the workers of a mesh with FSDP2.

    Each layer is gathered for its computation and released afterwards. The embedding table and the output head stay unsharded
    on each worker, because prefixes enter and targets are scored outside of the decoder. All workers must then run forward and
    backward passes in step.

    Args:
        model: model on the CPU or on `device`.
        mesh: device mesh of the workers.
        device: device of this worker.
    """
    decoder = model.get_decoder()
    ends = [model.get_input_embeddings(), cast(nn.Module, model.get_output_embeddings())]
    unsharded = {parameter for module in ends for parameter in module.parameters()}
    for layer in get_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params=unsharded)
    for module in ends:
        module.to(device)

"""What can be done to the layers of a frozen model before a prefix is learned on it: recompute, compile, shard.

The order matters: what is recomputed is compiled, and what is compiled is sharded.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # the wrapper that PyTorch's own trainers use
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from trimtab.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def get_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder's layers. Raises UsageError where the family keeps them elsewhere."""
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise UsageError(
            f"{type(model).__name__} keeps its layers where trimtab does not find them: no recompute, compile, shard"
        )
    return found


def enable_activation_checkpointing(model: "PreTrainedModel") -> None:
    """Keep only what goes into each layer, and compute the rest again in the backward pass."""
    own = get_layers(model)
    for index, layer in enumerate(own):
        own[index] = checkpoint_wrapper(layer, CheckpointImpl.NO_REENTRANT)


def compile_layers(model: "PreTrainedModel") -> None:
    """Compile each layer by itself: they share one compiled code, which takes seconds where the whole model takes minutes."""
    for layer in get_layers(model):
        layer.compile(dynamic=True)


def shard_model(model: "PreTrainedModel", mesh: DeviceMesh, device: torch.device) -> None:
    """Cut the layers' weights over the workers of `mesh` (FSDP2): each layer is gathered when it computes, and let go after.

    The embedding table and the head stay whole on each worker, as prefixes go in and targets are scored outside of
    the decoder. All workers must then run forward and backward passes in step.
    """
    decoder = model.get_decoder()
    ends = [model.get_input_embeddings(), cast(nn.Module, model.get_output_embeddings())]
    whole = {parameter for module in ends for parameter in module.parameters()}
    for layer in get_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for module in ends:
        module.to(device)

"""Adapter of vLLM's model runner.

The signal capture and the patches read a model runner only through a `RunnerAdapter`, and replace its methods only through
patches.py.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from trimtab.engine.vllm_ext import patches

# Attributes of a model runner that exist when it is constructed.
RUNNER_ATTRIBUTES = (
    "_bookkeeping_sync",
    "_sample",
    "device",
    "discard_request_mask.np",
    "execute_model_state",
    "get_model",
    "input_batch.block_table",
    "input_batch.generators",
    "input_batch.num_computed_tokens_cpu",
    "input_batch.num_reqs",
    "input_batch.req_ids",
    "max_model_len",
    "max_num_reqs",
    "model_config.get_hidden_size",
    "use_aux_hidden_state_outputs",
)
# Attributes that exist when the KV cache is allocated.
CACHE_ATTRIBUTES = ("kv_cache_config.kv_cache_groups", "kv_cache_config.num_blocks")
# Attributes of each block table.
TABLE_ATTRIBUTES = ("block_size", "blocks_per_kv_block", "get_numpy_array")


class BlockTable(Protocol):
    """Blocks of the KV cache that the requests in the batch use, for one group of layers.

    Attributes:
        block_size: number of tokens in a block.
        blocks_per_kv_block: number of blocks that one block of the KV cache is divided into.
    """

    block_size: int
    blocks_per_kv_block: int

    def get_numpy_array(self) -> NDArray[np.int32]:
        """Return the block ids [requests, blocks per request]."""
        ...


@dataclass(frozen=True)
class RunnerStep:
    """Step of a model runner after its forward pass and before sampling.

    Attributes:
        requests: engine ids of the requests in the batch [n].
        counts: number of tokens of each request in this step [n].
        starts: position of the first of these tokens in each request [n].
        layer_states: hidden states of each captured layer [T, d]; T can include padding after the tokens of the step.
        hidden_states: states that the logits are computed from [T, d].
        logits: logits of the last token of each request [n, V].
    """

    requests: Sequence[str]
    counts: NDArray[np.int64]
    starts: NDArray[np.int32]
    layer_states: Sequence[Tensor]
    hidden_states: Tensor
    logits: Tensor


class RunnerAdapter(Protocol):
    """Access to a model runner of vLLM.

    Attributes:
        owner: the model runner, whose methods the patches replace.
        device: device of the model.
        max_requests: maximum number of requests in a batch.
        max_length: maximum length of a request, in tokens.
        width: width of the model.
    """

    owner: Any
    device: torch.device
    max_requests: int
    max_length: int
    width: int

    @abstractmethod
    def capture_layers(self, layers: Sequence[int]) -> None:
        """Make the forward pass return the hidden states of layers. Called after the model is loaded.

        Args:
            layers: layers in ascending order; layer k is `hidden_states[k]` of transformers.

        Raises:
            ValueError: if the model class does not expose hidden states.
        """
        ...

    @abstractmethod
    def get_block_table(self) -> BlockTable:
        """Return the block table of the first group of full-attention layers. Called after the KV cache is allocated."""
        ...

    @abstractmethod
    def count_blocks(self) -> int:
        """Return the number of blocks that the block table can refer to. Called after the KV cache is allocated."""
        ...

    @abstractmethod
    def get_step(self) -> RunnerStep | None:
        """Return the step that awaits sampling; None at other times."""
        ...

    @abstractmethod
    def get_discarded(self) -> NDArray[np.bool_]:
        """Return whether the next token of each request in the batch is sampled only to be discarded [n], as in mid-prompt."""
        ...

    @abstractmethod
    def get_generators(self) -> dict[int, torch.Generator]:
        """Return the random generators of the requests with a seed, by index in the batch. Changes take effect."""
        ...

    @abstractmethod
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [N, V] of states [N, d]."""
        ...


class ModelRunnerV1Adapter(RunnerAdapter):
    """Adapter of vLLM's first model runner: `GPUModelRunner`, and `CPUModelRunner`, which extends it.

    Args:
        runner: the model runner.
    """

    def __init__(self, runner: Any) -> None:
        self.owner = runner
        self.device = runner.device
        self.max_requests = runner.max_num_reqs
        self.max_length = runner.max_model_len
        self.width = runner.model_config.get_hidden_size()

    def capture_layers(self, layers: Sequence[int]) -> None:
        model = self.owner.get_model()
        if not hasattr(model, "set_aux_hidden_state_layers"):
            raise ValueError(
                f"vLLM's {type(model).__name__} exposes no auxiliary hidden states. Detectors do not support this model"
            )
        model.set_aux_hidden_state_layers(tuple(layers))
        self.owner.use_aux_hidden_state_outputs = True

    def get_block_table(self) -> BlockTable:
        return self.owner.input_batch.block_table[find_full_attention_group(self.owner.kv_cache_config)]

    def count_blocks(self) -> int:
        return self.owner.kv_cache_config.num_blocks * self.get_block_table().blocks_per_kv_block

    def get_step(self) -> RunnerStep | None:
        if (state := self.owner.execute_model_state) is None:
            return None
        batch, scheduled = self.owner.input_batch, state.scheduler_output.num_scheduled_tokens
        counts = np.array([scheduled[request] for request in batch.req_ids])
        starts = batch.num_computed_tokens_cpu[: len(counts)]
        return RunnerStep(batch.req_ids, counts, starts, state.aux_hidden_states, state.hidden_states, state.logits)

    def get_discarded(self) -> NDArray[np.bool_]:
        return self.owner.discard_request_mask.np[: self.owner.input_batch.num_reqs]

    def get_generators(self) -> dict[int, torch.Generator]:
        return self.owner.input_batch.generators

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.owner.get_model().compute_logits(hidden_states)


def find_full_attention_group(cache: KVCacheConfig) -> int:
    """Find the first group of full-attention layers, which keep the KV blocks of the complete prompt.

    Args:
        cache: vLLM's configuration of the KV cache.

    Returns:
        Index of the group.

    Raises:
        ValueError: if there is none, for example if all layers use sliding windows.
    """
    for index, group in enumerate(cache.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec, FullAttentionSpec):
            return index
    raise ValueError("no layer of this model keeps the complete prompt in the KV cache. Detectors do not support this model")


def check_runner(runner: Any, *, allocated: bool = False) -> None:
    """Raise IncompatibleLibraryError if a model runner lacks an attribute that `ModelRunnerV1Adapter` uses.

    Args:
        runner: model runner of vLLM.
        allocated: whether the KV cache is allocated, so that its attributes are checked, too.

    Raises:
        IncompatibleLibraryError: if an attribute is missing.
    """
    check = patches.REGISTER.check_attributes
    check("model runner", runner, (*RUNNER_ATTRIBUTES, *(CACHE_ATTRIBUTES if allocated else ())), patches.VERSIONS)
    if allocated:
        check("model runner", runner.input_batch.block_table[0], TABLE_ATTRIBUTES, patches.VERSIONS)

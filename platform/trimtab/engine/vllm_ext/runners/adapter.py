"""Interface to a model runner of vLLM.

The signal capture reads a model runner only through a `RunnerAdapter`, and replaces its methods only through patches.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from trimtab.engine.vllm_ext import patches

TokenUpdate = Callable[[Tensor], None]
"""Reads and replaces the sampled tokens [n, 1] of the requests in a batch, in place."""


@dataclass(frozen=True)
class RunnerStep:
    """Step of a model runner after its forward pass and before sampling.

    Attributes:
        requests: engine ids of the requests in the batch [n].
        counts: number of tokens of each request in this step [n].
        starts: position of the first of these tokens in each request [n].
        discarded: whether the next token of each request is sampled only to be discarded [n], as in mid-prompt.
        layer_states: hidden states of each captured layer [T, d]; T can include padding after the tokens of the step.
        hidden_states: states that the logits are computed from [T, d].
    """

    requests: Sequence[str]
    counts: NDArray[np.integer[Any]]
    starts: NDArray[np.integer[Any]]
    discarded: NDArray[np.bool_]
    layer_states: Sequence[Tensor]
    hidden_states: Tensor


class RunnerAdapter(ABC):
    """Access to a model runner of vLLM.

    Args:
        runner: the model runner.

    Attributes:
        runner_attributes: attributes of a model runner that exist when it is constructed.
        cache_attributes: attributes that exist when the KV cache is allocated.
        sampling_patch: name of the patch that `add_token_update` applies.
        owner: the model runner, whose methods the patches replace.
        device: device of the model.
        max_requests: maximum number of requests in a batch.
        max_length: maximum length of a request, in tokens.
        width: width of the model.
    """

    runner_attributes: ClassVar[tuple[str, ...]]
    cache_attributes: ClassVar[tuple[str, ...]]
    sampling_patch: ClassVar[str]

    def __init__(self, runner: Any) -> None:
        self.owner = runner
        self.device: torch.device = runner.device
        self.max_requests: int = runner.max_num_reqs
        self.max_length: int = runner.max_model_len
        self.width: int = runner.model_config.get_hidden_size()

    def check_attributes(self, *, allocated: bool = False) -> None:
        """Raise IncompatibleLibraryError if the model runner lacks an attribute that this adapter reads.

        Args:
            allocated: whether the KV cache is allocated, so that its attributes are checked, too.

        Raises:
            IncompatibleLibraryError: if an attribute is missing.
        """
        paths = (*self.runner_attributes, *(self.cache_attributes if allocated else ()))
        patches.REGISTER.check_attributes("model runner", self.owner, paths, patches.VERSIONS)

    @abstractmethod
    def get_block_size(self) -> int:
        """Return the number of tokens in a block of the block table. Called after the KV cache is allocated."""
        ...

    def count_blocks(self) -> int:
        """Return the number of blocks that the block table can refer to. Called after the KV cache is allocated."""
        return self.owner.kv_cache_config.num_blocks

    @abstractmethod
    def get_step(self) -> RunnerStep | None:
        """Return the step that awaits sampling; None at other times."""
        ...

    @abstractmethod
    def get_blocks(self, lines: NDArray[np.integer[Any]], numbers: NDArray[np.integer[Any]]) -> Tensor:
        """Return blocks of requests in the step that awaits sampling.

        Args:
            lines: indices of the requests in the batch [N].
            numbers: indices of the blocks in these requests [N].

        Returns:
            Ids of the blocks in the first group of full-attention layers [N], on the device of the model.
        """
        ...

    @abstractmethod
    def get_next_logits(self, lines: Tensor) -> Tensor:
        """Return the logits [n, V] of the next tokens of requests in the step that awaits sampling.

        Args:
            lines: indices of the requests in the batch [n].
        """
        ...

    @abstractmethod
    def wrap_sampling(self, wrap: patches.Wrap) -> None:
        """Replace the method of the model runner that samples."""
        ...

    @abstractmethod
    def get_sampled_tokens(self, result: Any) -> Tensor:
        """Return the sampled tokens [n, 1] in the result of this method. Changes take effect."""
        ...

    def add_token_update(self, update: TokenUpdate) -> None:
        """Call `update` with the sampled tokens of each step before the runner uses them."""

        def wrap(sample: Callable[..., Any]) -> Callable[..., Any]:
            def sample_and_update(*args: Any, **options: Any) -> Any:
                result = sample(*args, **options)
                update(self.get_sampled_tokens(result))
                return result

            return sample_and_update

        self.wrap_sampling(wrap)

    def capture_layers(self, layers: Sequence[int]) -> None:
        """Make the forward pass return the hidden states of layers. Called after the model is loaded.

        Args:
            layers: layers in ascending order; layer k is `hidden_states[k]` of transformers.

        Raises:
            ValueError: if the model class does not expose hidden states.
        """
        model = self.owner.get_model()
        if not hasattr(model, "set_aux_hidden_state_layers"):
            raise ValueError(
                f"vLLM's {type(model).__name__} exposes no auxiliary hidden states. Detectors do not support this model"
            )
        model.set_aux_hidden_state_layers(tuple(layers))
        self.owner.use_aux_hidden_state_outputs = True

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits [N, V] of states [N, d]."""
        return self.owner.get_model().compute_logits(hidden_states)

    @cached_property
    def attention_group(self) -> int:
        """Index of the first group of full-attention layers. Read after the KV cache is allocated."""
        return find_full_attention_group(self.owner.kv_cache_config)


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

"""Adapter of vLLM's second model runner, which a GPU uses by default.

It differs from the first runner in three points:

- The state of a request has a fixed row, and the batch of a step lists the rows. The block table is on the device.
- The logits are computed when the runner samples. `get_next_logits` computes them before, so that the output layer runs twice
  for the requests whose token statistics are captured.
- The sampler is called by `sample`, which returns two more values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter, RunnerStep, TokenUpdate, find_full_attention_group

# Attributes of a model runner that exist when it is constructed.
RUNNER_ATTRIBUTES = (
    "device",
    "execute_model_state",
    "get_model",
    "max_model_len",
    "max_num_reqs",
    "model_config.get_hidden_size",
    "pcp_manager",
    "sample",
    "use_aux_hidden_state_outputs",
)
# Attributes that exist when the KV cache is allocated.
CACHE_ATTRIBUTES = (
    "block_tables.block_tables",
    "block_tables.blocks_per_kv_block",
    "block_tables.kernel_block_sizes",
    "kv_cache_config.kv_cache_groups",
    "kv_cache_config.num_blocks",
)
# Attributes of the batch of a step.
BATCH_ATTRIBUTES = (
    "idx_mapping_np",
    "logits_indices",
    "num_computed_prefill_tokens_np",
    "num_computed_tokens_np",
    "num_scheduled_tokens",
    "prefill_len_np",
    "req_ids",
)


class ModelRunnerV2Adapter(RunnerAdapter):
    """Adapter of vLLM's second model runner.

    Args:
        runner: the model runner.
    """

    def __init__(self, runner: Any) -> None:
        self.owner = runner
        self.device = runner.device
        self.max_requests = runner.max_num_reqs
        self.max_length = runner.max_model_len
        self.width = runner.model_config.get_hidden_size()

    def check_attributes(self, *, allocated: bool = False) -> None:
        patches.REGISTER.check("patch_sampling_v2")
        paths = (*RUNNER_ATTRIBUTES, *(CACHE_ATTRIBUTES if allocated else ()))
        patches.REGISTER.check_attributes("model runner", self.owner, paths, patches.VERSIONS)
        if self.owner.pcp_manager is not None:
            raise ValueError("detectors do not support prefill context parallelism. Start the server without it")

    def get_block_size(self) -> int:
        return self.owner.block_tables.kernel_block_sizes[self._find_group()]

    def count_blocks(self) -> int:
        return self.owner.kv_cache_config.num_blocks * self.owner.block_tables.blocks_per_kv_block[self._find_group()]

    def get_step(self) -> RunnerStep | None:
        if (state := self.owner.execute_model_state) is None:
            return None
        batch = state.input_batch
        counts = batch.num_scheduled_tokens
        discarded = batch.num_computed_prefill_tokens_np + counts < batch.prefill_len_np
        starts = batch.num_computed_tokens_np
        return RunnerStep(batch.req_ids, counts, starts, discarded, state.aux_hidden_states, state.hidden_states)

    def get_blocks(self, lines: NDArray[np.integer[Any]], numbers: NDArray[np.integer[Any]]) -> Tensor:
        rows = self.owner.execute_model_state.input_batch.idx_mapping_np[lines]
        table = self.owner.block_tables.block_tables[self._find_group()].gpu
        return table[torch.as_tensor(rows, device=self.device), torch.as_tensor(numbers, device=self.device)].long()

    def get_next_logits(self, lines: Tensor) -> Tensor:
        state = self.owner.execute_model_state
        return self.compute_logits(state.hidden_states[state.input_batch.logits_indices[lines]])

    def add_token_update(self, update: TokenUpdate) -> None:
        def wrap(sample: Callable[..., Any]) -> Callable[..., Any]:
            def sample_and_update(*args: Any, **options: Any) -> Any:
                output, *others = sample(*args, **options)
                update(output.sampled_token_ids)
                return output, *others

            return sample_and_update

        patches.patch_sampling_v2(self.owner, wrap)

    def _find_group(self) -> int:
        return find_full_attention_group(self.owner.kv_cache_config)

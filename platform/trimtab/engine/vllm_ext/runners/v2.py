"""Adapter of vLLM's second model runner, which a GPU uses by default.

It differs from the first runner in three points:

- The state of a request has a fixed row, and the batch of a step lists the rows. The block table is on the device.
- The logits are computed when the runner samples. `get_next_logits` computes them before, so that the output layer runs twice
  for the requests whose token statistics are captured.
- The sampler is called by `sample`, which returns two more values.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter, RunnerStep

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
    "block_tables.block_sizes",
    "block_tables.block_tables",
    "kv_cache_config.kv_cache_groups",
    "kv_cache_config.num_blocks",
)
# Attributes of the batch of a step. It does not exist at start-up: a test checks them.
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
    """Adapter of vLLM's second model runner."""

    runner_attributes, cache_attributes, sampling_patch = RUNNER_ATTRIBUTES, CACHE_ATTRIBUTES, "patch_sampling_v2"

    def check_attributes(self, *, allocated: bool = False) -> None:
        super().check_attributes(allocated=allocated)
        if self.owner.pcp_manager is not None:
            raise ValueError("detectors do not support prefill context parallelism. Start the server without it")

    def get_block_size(self) -> int:
        return self.owner.block_tables.block_sizes[self.attention_group]

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
        table = self.owner.block_tables.block_tables[self.attention_group].gpu
        return table[torch.as_tensor(rows, device=self.device), torch.as_tensor(numbers, device=self.device)].long()

    def get_next_logits(self, lines: Tensor) -> Tensor:
        state = self.owner.execute_model_state
        return self.compute_logits(state.hidden_states[state.input_batch.logits_indices[lines]])

    def wrap_sampling(self, wrap: patches.Wrap) -> None:
        patches.patch_sampling_v2(self.owner, wrap)

    def get_sampled_tokens(self, result: Any) -> Tensor:
        return result[0].sampled_token_ids

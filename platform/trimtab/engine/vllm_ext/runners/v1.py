"""Adapter of vLLM's first model runner: `GPUModelRunner`, and `CPUModelRunner`, which extends it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter, RunnerStep

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
TABLE_ATTRIBUTES = ("block_size", "get_numpy_array")


class ModelRunnerV1Adapter(RunnerAdapter):
    """Adapter of vLLM's first model runner."""

    runner_attributes, cache_attributes, sampling_patch = RUNNER_ATTRIBUTES, CACHE_ATTRIBUTES, "patch_sampling"

    def check_attributes(self, *, allocated: bool = False) -> None:
        super().check_attributes(allocated=allocated)
        if allocated:
            table = self.owner.input_batch.block_table[0]
            patches.REGISTER.check_attributes("model runner", table, TABLE_ATTRIBUTES, patches.VERSIONS)

    def get_block_size(self) -> int:
        return self._get_table().block_size

    def get_step(self) -> RunnerStep | None:
        if (state := self.owner.execute_model_state) is None:
            return None
        batch, scheduled = self.owner.input_batch, state.scheduler_output.num_scheduled_tokens
        counts = np.array([scheduled[request] for request in batch.req_ids])
        starts = batch.num_computed_tokens_cpu[: len(counts)]
        return RunnerStep(batch.req_ids, counts, starts, self.get_discarded(), state.aux_hidden_states, state.hidden_states)

    def get_blocks(self, lines: NDArray[np.integer[Any]], numbers: NDArray[np.integer[Any]]) -> Tensor:
        blocks = self._get_table().get_numpy_array()[lines, numbers]
        return torch.as_tensor(blocks, device=self.device).long()

    def get_next_logits(self, lines: Tensor) -> Tensor:
        return self.owner.execute_model_state.logits[lines]

    def wrap_sampling(self, wrap: patches.Wrap) -> None:
        patches.patch_sampling(self.owner, wrap)

    def get_sampled_tokens(self, result: Any) -> Tensor:
        return result.sampled_token_ids

    def get_discarded(self) -> NDArray[np.bool_]:
        """Return whether the next token of each request in the batch is sampled only to be discarded [n]."""
        return self.owner.discard_request_mask.np[: self.owner.input_batch.num_reqs]

    def get_generators(self) -> dict[int, torch.Generator]:
        """Return the random generators of the requests with a seed, by index in the batch. Changes take effect."""
        return self.owner.input_batch.generators

    def _get_table(self) -> Any:
        return self.owner.input_batch.block_table[self.attention_group]

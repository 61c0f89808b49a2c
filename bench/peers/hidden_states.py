"""Hidden states of answers by vLLM's `extract_hidden_states`, as in its documentation, also on a CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
    load_hidden_states,
)

from trimtab.engine.config import EngineConfig
from trimtab.engine.vllm_ext.args import is_cpu_build
from trimtab.model.base_model import BaseModel


class CompletedCopy:
    """Completed copy to the host, in the place of a CUDA event."""

    def synchronize(self) -> None:
        """Return at once."""


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Connector that writes the same files without CUDA streams, which a CPU does not have."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        assert self._kv_cache is not None
        blocks, offsets = torch.tensor(pending.block_ids)[:, None], torch.arange(self._block_size)
        slots, count = (blocks * self._block_size + offsets).flatten(), len(pending.token_ids)
        tensors = {
            "hidden_states": extract_from_kv_cache(self._kv_cache, slots, count).contiguous(),
            "token_ids": pending.token_ids,
        }
        lock = self._lock_fds.pop(pending.req_id, None)
        self._executor.submit(self._write_tensors, tensors, CompletedCopy(), pending.filename, lock)


def build_arguments(base: BaseModel, config: EngineConfig, layers: Sequence[int], folder: Path) -> dict[str, Any]:
    """Build arguments of `vllm.LLM` that write the states of layers to a folder, with the settings of trimtab's engine."""
    connector: dict[str, Any] = {"kv_connector": "ExampleHiddenStatesConnector"}
    if is_cpu_build():
        connector = {"kv_connector": CpuHiddenStatesConnector.__name__, "kv_connector_module_path": "peers.hidden_states"}
    options = {"shared_storage_path": str(folder)}
    return {
        "model": str(base.path),
        "dtype": "float32",
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": 2 * config.max_model_len,
        "enable_chunked_prefill": False,
        "enforce_eager": is_cpu_build(),
        "generation_config": "vllm",
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
        },
        "kv_transfer_config": connector | {"kv_role": "kv_producer", "kv_connector_extra_config": options},
        **({"block_size": 32, "distributed_executor_backend": "uni"} if is_cpu_build() else {}),
    }


def extract_states(llm: LLM, prompts: Sequence[list[int]], tokens: int) -> list[tuple[list[int], Tensor]]:
    """Generate greedy answers and read their files.

    Returns:
        Token ids of each answer, and the states of the tokens of its prompt and of all but its last one [n, L, d].
    """
    transfer = {"kv_transfer_params": {"include_output_tokens": True}}
    sampling = SamplingParams(temperature=0, max_tokens=tokens, extra_args=transfer)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    paths = [output.kv_transfer_params["hidden_states_path"] for output in outputs if output.kv_transfer_params]
    states = [load_hidden_states(path)["hidden_states"] for path in paths]
    return [(list(output.outputs[0].token_ids), state) for output, state in zip(outputs, states, strict=True)]

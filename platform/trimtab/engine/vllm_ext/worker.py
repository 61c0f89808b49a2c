"""What runs inside each vLLM worker: writing rows into the embedding table, and keeping row tokens from being generated."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import is_cpu_build


class EmbeddingWorkerExtension:
    """Mixed into vLLM's own worker by `worker_extension_cls`; every method is called on all workers by `collective_rpc`."""

    model_runner: Any

    def trimtab_mask_reserved_ids(self, first_row: int) -> int:
        """Mask the logits of every token id from `first_row` up; return the width of the embedding."""
        if is_cpu_build():
            patches.patch_seeded_sampling(self.model_runner)
        patches.patch_logits(self.model_runner, first_row)
        return int(_find_embedding(self.model_runner.get_model()).weight.shape[1])

    def trimtab_write_vectors(self, rows: list[int], vectors: bytes) -> None:
        """Write float32 vectors [len(rows), d] into these rows; with tensor parallelism each rank writes the rows it holds.

        The table keeps its address, so compiled and captured graphs see the new values.
        """
        table = _find_embedding(self.model_runner.get_model())
        weight = table.weight.data
        values = torch.frombuffer(bytearray(vectors), dtype=torch.float32).view(len(rows), -1)
        start = table.shard_indices.org_vocab_start_index
        end = table.shard_indices.org_vocab_end_index
        for row, value in zip(rows, values, strict=True):
            if start <= row < end:
                weight[row - start].copy_(value.to(weight.dtype))


def _find_embedding(model: nn.Module) -> Any:
    """The input embedding, a VocabParallelEmbedding. Found by type: where it hangs differs between vLLM's model classes."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            return module
    raise TypeError(f"{type(model).__name__} has no vocabulary embedding that rows could be written to")

"""Worker extension that writes rows of the embedding table and masks reserved token ids."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import is_cpu_build


class EmbeddingWorkerExtension:
    """Extension of vLLM's worker, set by `worker_extension_cls`. `collective_rpc` calls each method on all workers."""

    model_runner: Any

    def trimtab_mask_reserved_ids(self, first_row: int) -> int:
        """Mask the logits of all token ids from `first_row` up.

        Returns:
            Width of the embedding.
        """
        if is_cpu_build():
            patches.patch_seeded_sampling(self.model_runner)
        patches.patch_logits(self.model_runner, first_row)
        return int(_find_embedding(self.model_runner.get_model()).weight.shape[1])

    def trimtab_write_vectors(self, rows: list[int], vectors: bytes) -> None:
        """Write vectors into rows of the embedding table.

        With tensor parallelism, each rank writes the rows of its shard. The table keeps its address, so that compiled and
        captured graphs read the new values.

        Args:
            rows: token ids of the rows.
            vectors: float32 bytes of the vectors [len(rows), d].
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
    """Find the input embedding by type, since its attribute name differs between vLLM's model classes."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            return module
    raise TypeError(f"{type(model).__name__} has no vocabulary embedding. Prefixes do not support this model")

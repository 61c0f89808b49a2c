"""Worker extension that writes slots of the embedding table and masks reserved token ids."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from trimtab.engine.vllm_ext import patches
from trimtab.engine.vllm_ext.args import is_cpu_build
from trimtab.engine.vllm_ext.runners.v1 import ModelRunnerV1Adapter
from trimtab.util.heap import start_heap_trimmer


class EmbeddingWorkerExtension:
    """Extension of vLLM's worker, set by `worker_extension_cls`. `collective_rpc` calls each method on all workers."""

    model_runner: Any

    def trimtab_mask_reserved_ids(self, first_slot: int) -> int:
        """Mask the logits of all token ids from `first_slot` up; on a CPU, also return free memory of the heap at intervals.

        Returns:
            Width of the embedding.
        """
        if is_cpu_build():
            runner = ModelRunnerV1Adapter(self.model_runner)
            runner.check_attributes()
            patches.patch_seeded_sampling(runner)
            start_heap_trimmer()
        patches.patch_logits(self.model_runner, first_slot)
        return int(_find_embedding(self.model_runner.get_model()).weight.shape[1])

    def trimtab_write_vectors(self, slots: list[int], vectors: bytes) -> None:
        """Write vectors into slots of the embedding table.

        With tensor parallelism, each rank writes the slots of its shard. The table keeps its address, so that compiled and
        captured graphs read the new values.

        Args:
            slots: token ids of the slots.
            vectors: float32 bytes of the vectors [len(slots), d].
        """
        table = _find_embedding(self.model_runner.get_model())
        weight = table.weight.data
        values = torch.frombuffer(bytearray(vectors), dtype=torch.float32).view(len(slots), -1)
        start = table.shard_indices.org_vocab_start_index
        end = table.shard_indices.org_vocab_end_index
        for slot, value in zip(slots, values, strict=True):
            if start <= slot < end:
                weight[slot - start].copy_(value.to(weight.dtype))


def _find_embedding(model: nn.Module) -> Any:
    """Find the input embedding by type, since its attribute name differs between vLLM's model classes."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            return module
    raise TypeError(f"{type(model).__name__} has no vocabulary embedding. Prefixes do not support this model")

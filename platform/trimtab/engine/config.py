"""Configuration of the vLLM engine."""

from dataclasses import dataclass

from trimtab.types import DType


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of the vLLM engine.

    Args:
        num_slots: token ids reserved for prefixes at the end of the vocabulary; also the maximum number of resident one-slot
            prefixes.
        dtype: data type of weights and activations; auto selects bf16 if the device computes in it, otherwise fp32.
        max_model_len: maximum length of prompt and answer together, in tokens.
        max_num_seqs: maximum number of requests that run concurrently; further requests wait.
        max_num_batched_tokens: maximum number of tokens per step; longer prompts are split into chunks; 0 selects vLLM's
            default.
        num_gpu_blocks_override: number of KV cache blocks; 0 allocates as many as fit into the memory of the cache.
        tensor_parallel_size: number of devices that share one model.
        compile: compile the model at startup; startup takes longer, inference is about a tenth faster (CPU).
        cpu_kv_cache_gib: memory for the KV cache on machines without a GPU, in GiB.
        gpu_memory_utilization: fraction of GPU memory to use, from 0 to 1.
        seed: random seed of requests without a seed.
        tool_parser: parser of tool calls in vLLM, for example hermes; auto selects one by the chat template of the
            model, none disables tool choice.
        allowed_media_domains: hosts from which a multimodal model loads images for clients; by default none, because the
            server could be used to reach its internal network; clients can always send data: URLs.
        layers: layers whose hidden states are captured; 0 is the embedding layer; only detectors need captured layers.
        token_statistics: compute and store log-probability, entropy and margin of each captured token, also if no detector
            reads them; the head flag does.
    """

    num_slots: int = 1024
    dtype: DType = "auto"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    num_gpu_blocks_override: int = 0
    tensor_parallel_size: int = 1
    compile: bool = False
    cpu_kv_cache_gib: int = 1
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    tool_parser: str = "auto"
    allowed_media_domains: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    token_statistics: bool = False

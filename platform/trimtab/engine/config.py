"""Configuration of the vLLM engine."""

from dataclasses import dataclass

from trimtab.types import Precision


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of the vLLM engine.

    Args:
        rows: rows reserved for prefixes at the end of the vocabulary; also the maximum number of resident one-row prefixes.
        precision: data type of weights and activations; auto selects bf16 if the device computes in it, otherwise fp32.
        max_length: maximum length of prompt and answer together, in tokens.
        max_sequences: maximum number of requests that run concurrently; further requests wait.
        step_tokens: maximum number of tokens per step; longer prompts are split into chunks; 0 selects vLLM's default.
        kv_blocks: number of KV cache blocks; 0 allocates as many as fit into the memory of the cache.
        tensor_parallel: number of devices that share one model.
        compile: compile the model at startup; startup takes longer, inference is about a tenth faster (CPU).
        cpu_cache_gib: memory for the KV cache on machines without a GPU, in GiB.
        gpu_memory: fraction of GPU memory to use, from 0 to 1.
        seed: random seed of requests without a seed.
        tool_parser: vLLM's parser of tool calls, for example hermes or llama3_json; without one, tool choice is disabled.
        layers: layers whose hidden states are captured; 0 is the embedding layer; only detectors need captured layers.
        history: store log-probability, entropy and margin of each captured token.
    """

    rows: int = 1024
    precision: Precision = "auto"
    max_length: int = 2048
    max_sequences: int = 64
    step_tokens: int = 0
    kv_blocks: int = 0
    tensor_parallel: int = 1
    compile: bool = False
    cpu_cache_gib: int = 1
    gpu_memory: float = 0.9
    seed: int = 0
    tool_parser: str | None = None
    layers: tuple[int, ...] = ()
    history: bool = False

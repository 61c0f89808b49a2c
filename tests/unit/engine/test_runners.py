"""Adapters of vLLM's model runners: each attribute exists in vLLM, and a missing one is reported in one line."""

import ast
import inspect
import textwrap
import types

import pytest
from vllm.model_executor.models.interfaces import SupportsEagle3
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker import gpu_input_batch, gpu_model_runner
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch, model_runner

from trimtab.engine.vllm_ext.capture_worker import build_adapter
from trimtab.engine.vllm_ext.runners import v1, v2
from trimtab.errors import IncompatibleLibraryError

TABLE = "input_batch.block_table"
# Class of each attribute that the adapters read attributes of; None for those of vLLM's configuration.
OWNERS_V1 = {
    "input_batch": gpu_input_batch.InputBatch,
    "discard_request_mask": CpuGpuBuffer,
    "kv_cache_config": KVCacheConfig,
    "model_config": None,
}
OWNERS_V2 = {"block_tables": block_table.BlockTables, "kv_cache_config": KVCacheConfig, "model_config": None}


def find_attributes(cls: type) -> set[str]:
    """Find the attributes of a class and those that its methods assign to self."""
    names = set(dir(cls)) | set(inspect.get_annotations(cls))
    for parent in cls.__mro__[:-1]:
        names |= set(inspect.get_annotations(parent))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        except (OSError, TypeError):
            continue
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
        }
    return names


def list_paths(runner: type, paths: tuple[str, ...], owners: dict[str, type | None]) -> list:
    """List the class and attribute of each path."""
    parts = [(runner, path.partition(".")[0]) for path in paths]
    nested = [path.partition(".") for path in paths if "." in path]
    parts += [(owner, name) for first, _, name in nested if (owner := owners[first]) is not None]
    return [pytest.param(owner, name, id=f"{owner.__name__}-{name}") for owner, name in dict.fromkeys(parts)]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *list_paths(gpu_model_runner.GPUModelRunner, (*v1.RUNNER_ATTRIBUTES, *v1.CACHE_ATTRIBUTES), OWNERS_V1),
        *list_paths(CPUModelRunner, v1.RUNNER_ATTRIBUTES, OWNERS_V1),
        *list_paths(BlockTable, v1.TABLE_ATTRIBUTES, {}),
        *list_paths(model_runner.GPUModelRunner, (*v2.RUNNER_ATTRIBUTES, *v2.CACHE_ATTRIBUTES), OWNERS_V2),
        *list_paths(input_batch.InputBatch, v2.BATCH_ATTRIBUTES, {}),
        *list_paths(buffer_utils.StagedWriteTensor, ("gpu",), {}),
    ],
)
def test_attribute_exists_in_the_installed_vllm(owner, name):
    assert name in find_attributes(owner)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (LlamaForCausalLM.compute_logits, ["self", "hidden_states"]),
        (SupportsEagle3.set_aux_hidden_state_layers, ["self", "layers"]),
        (gpu_model_runner.GPUModelRunner.get_model, ["self"]),
        (model_runner.GPUModelRunner.get_model, ["self"]),
        (model_runner.GPUModelRunner.sample, ["self", "hidden_states", "input_batch", "grammar_output"]),
        (BlockTable.get_numpy_array, ["self"]),
    ],
)
def test_method_takes_the_arguments_of_the_adapters(method, parameters):
    assert list(inspect.signature(method).parameters) == parameters


def test_adapter_is_chosen_by_the_class_of_the_runner():
    first = build_runner(v1)
    second = object.__new__(model_runner.GPUModelRunner)
    second.device, second.max_num_reqs, second.max_model_len = None, 1, 1
    second.model_config = types.SimpleNamespace(get_hidden_size=lambda: 8)
    assert isinstance(build_adapter(first), v1.ModelRunnerV1Adapter)
    assert isinstance(build_adapter(second), v2.ModelRunnerV2Adapter)


ADAPTERS = {v1: v1.ModelRunnerV1Adapter, v2: v2.ModelRunnerV2Adapter}


def build_runner(module: types.ModuleType) -> types.SimpleNamespace:
    """Build a runner with every attribute that an adapter reads."""
    runner = types.SimpleNamespace()
    for path in (*module.RUNNER_ATTRIBUTES, *module.CACHE_ATTRIBUTES):
        owner, names = runner, path.split(".")
        for name in names[:-1]:
            if not hasattr(owner, name):
                setattr(owner, name, types.SimpleNamespace())
            owner = getattr(owner, name)
        setattr(owner, names[-1], None)
    runner.model_config.get_hidden_size = lambda: 8
    if module is v1:
        runner.input_batch.block_table = [types.SimpleNamespace(**dict.fromkeys(v1.TABLE_ATTRIBUTES))]
    return runner


def check_without(module: types.ModuleType, path: str, *, allocated: bool = True) -> None:
    """Check a runner that lacks an attribute; each `0` of its path is an index."""
    runner = build_runner(module)
    adapter = ADAPTERS[module](runner)
    owner = runner
    *names, last = path.split(".")
    for name in names:
        owner = owner[0] if name == "0" else getattr(owner, name)
    delattr(owner, last)
    adapter.check_attributes(allocated=allocated)


@pytest.mark.parametrize("module", ADAPTERS)
def test_runner_with_all_attributes_passes(module):
    adapter = ADAPTERS[module](build_runner(module))
    adapter.check_attributes()
    adapter.check_attributes(allocated=True)


@pytest.mark.parametrize(
    ("module", "path"),
    [
        *((module, path) for module in ADAPTERS for path in (*module.RUNNER_ATTRIBUTES, *module.CACHE_ATTRIBUTES)),
        *((v1, f"{TABLE}.0.{name}") for name in v1.TABLE_ATTRIBUTES),
    ],
)
def test_missing_attribute_is_reported_in_one_line(module, path):
    name = path.removeprefix(f"{TABLE}.0.")
    with pytest.raises(
        IncompatibleLibraryError,
        match=rf"^model runner: SimpleNamespace\.{name} of vllm [0-9.]+ does not exist\. Install vllm 0\.32\.0$",
    ):
        check_without(module, path)


@pytest.mark.parametrize(("module", "path"), [(module, path) for module in ADAPTERS for path in module.CACHE_ATTRIBUTES])
def test_cache_attributes_are_checked_only_after_allocation(module, path):
    check_without(module, path, allocated=False)

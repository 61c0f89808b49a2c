"""Patches of vLLM and Ray: the patched symbols exist, and changes upstream are detected."""

import sys
import types
from importlib import import_module

import jinja2
import pytest

from tests.support import ROOT
from trimtab import ray_patches
from trimtab.engine.vllm_ext import patches
from trimtab.errors import IncompatibleLibraryError
from trimtab.util.patching import PatchRegister, Symbol, is_applied, replace_attribute

REGISTERS = {"vllm": patches.REGISTER, "ray": ray_patches.REGISTER}
PATCHES = [
    pytest.param(register, name, id=f"{library}-{name}") for library, register in REGISTERS.items() for name in register.patches
]


@pytest.mark.slow
@pytest.mark.parametrize(("register", "name"), PATCHES)
def test_installed_library_has_the_patched_symbols(register, name):
    register.check(name)


@pytest.mark.parametrize(("register", "name"), PATCHES)
def test_patch_states_its_reason_and_removal_condition(register, name):
    patch = register.patches[name]
    assert patch.symbols
    assert patch.upstream.startswith(("https://github.com/", "none: "))
    assert patch.versions
    assert patch.remove_when


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vllm.v1.engine.async_llm.AsyncLLM.add_request", "patch_add_request"),
        ("vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample", "patch_seeded_sampling"),
        ("ray.serve._private.replica.add_port_to_grpc_server", "patch_replica_address"),
    ],
)
def test_changed_upstream_symbol_is_reported_in_one_line(path, name, monkeypatch):
    register = next(register for register in REGISTERS.values() if name in register.patches)
    monkeypatch.setattr(path, lambda unexpected: None)
    with pytest.raises(IncompatibleLibraryError, match=rf"^{name}: .* takes \(unexpected\), not .*\. Install [a-z]+ [0-9.]+$"):
        register.check(name)


def test_missing_symbol_is_reported_in_one_line():
    register = PatchRegister("json", "pip")

    @register.add(Symbol("json:missing"), upstream="none: test", versions="1.0", remove_when="never")
    def patch_missing() -> None: ...

    with pytest.raises(
        IncompatibleLibraryError, match=r"^patch_missing: json:missing of json .* does not exist\. Install json 1\.0$"
    ):
        register.check()


def test_patch_is_applied_once():
    owner = types.SimpleNamespace(count=lambda: 1)
    for _ in range(2):
        replace_attribute(owner, "count", "double", lambda count: lambda: 2 * count())
    assert owner.count() == 2
    assert is_applied(owner, "count", "double")
    assert not is_applied(owner, "count", "other")


def test_last_patch_of_a_symbol_is_outermost():
    calls: list[str] = []
    owner = types.SimpleNamespace(call=lambda: calls.append("original"))
    for name in ("first", "second"):
        replace_attribute(owner, "call", name, lambda call, name=name: lambda: (calls.append(name), call()))
    owner.call()
    assert calls == ["second", "first", "original"]


@pytest.mark.slow
def test_kernels_are_replaced_beside_an_object_that_is_bound_to_a_request(monkeypatch):
    dispatcher = import_module("vllm.triton_utils.dispatcher")

    class Bound:
        @property
        def __dict__(self):
            raise RuntimeError("outside of a request")

    def kernel(): ...

    def replacement(): ...

    module = types.ModuleType("module_with_kernel")
    module.first, module.kernel = Bound(), kernel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    patches.patch_kernel_registration()
    dispatcher.register_kernels({f"{module.__name__}.kernel": replacement})
    assert module.kernel.func is replacement


@pytest.mark.slow
def test_haproxy_configuration_has_the_added_options(monkeypatch):
    """Rendered from the template of the installed Ray."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    environment: dict[str, str] = {}
    ray_patches.patch_haproxy_options(environment)
    (options,) = environment.values()
    start = HAPROXY_CONFIG_TEMPLATE.index("option redispatch 1")
    lines = HAPROXY_CONFIG_TEMPLATE[start:].splitlines()[:2]
    rendered = jinja2.Template("\n".join(lines)).render(config={"retry_on": options})
    assert [line.strip() for line in rendered.splitlines()[1:]] == [
        "retry-on conn-failure empty-response",
        "no option splice-request",
        "timeout http-request 30s",
        "timeout http-keep-alive 300s",
    ]


def test_only_the_registers_replace_symbols():
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("platform", "jobs", "serve")
        for path in (ROOT / folder).rglob("*.py")
        if "replace_attribute" in path.read_text()
    ]
    assert sorted(modules) == [
        "platform/trimtab/engine/vllm_ext/patches.py",
        "platform/trimtab/ray_patches.py",
        "platform/trimtab/util/patching.py",
    ]

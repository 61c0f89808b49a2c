"""Repository layout: no shadowing of `platform`, the cluster file, sizes of folders and modules, limits on imports."""

import ast
import platform
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError

from tests.support import ROOT

CHECK = "import platform; assert platform.python_version().startswith('3'), platform; print(platform.__file__)"


def test_platform_folder_is_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.python_version()


def test_root_folder_does_not_shadow_platform_module():
    result = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT) not in result.stdout


TASK_SCRIPT = """
import sys
import ray

ray.init("local", include_dashboard=False, runtime_env={"working_dir": sys.argv[1], "excludes": sys.argv[2:]})

@ray.remote(num_cpus=0)
def report():
    import platform
    import trimtab.jobs
    return platform.__file__, platform.python_version(), trimtab.jobs.__name__

print(*ray.get(report.remote()), sep="\\n")
"""


@pytest.mark.slow
def test_ray_working_directory_does_not_shadow_platform_module():
    """The test starts its own Ray, because a working directory belongs to a whole job."""
    excluded = [".git", ".venv", "mlflow.db", "*.safetensors"]
    script = [sys.executable, "-c", TASK_SCRIPT, str(ROOT), *excluded]
    result = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    file, version, jobs = result.stdout.split()
    assert "working_dir" not in file
    assert version.startswith("3.11")
    assert jobs == "trimtab.jobs"


def test_cluster_file_matches_ray_schema():
    """Ray fills in defaults and validates the file."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    # `ray up` adds this key from its command line.
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(ValidationError):
        validate_config(config | {"max_workers": "many"})


FOLDERS = {"platform/trimtab": "trimtab", "jobs": "trimtab.jobs", "serve": "trimtab.serve"}
MAX_MODULES, MAX_LINES, MIN_LINES = 14, 350, 40
# Short modules with one importer that a process boundary keeps apart.
PROCESS_BOUNDARIES = {
    "trimtab.jobs.align.controller_side": "Ray Train's controller imports it, without torch",
    "trimtab.jobs.evaluate.generation_task": "only this Ray task imports vLLM, which takes half a minute",
    "trimtab.jobs.evaluate.utility_task": "only this Ray task imports the model",
    "trimtab.engine.vllm_ext.worker": "vLLM imports it in each worker process",
}


def list_modules() -> dict[str, Path]:
    """List all modules of the package by name, without `__init__.py`."""
    return {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]): path
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def find_importers() -> dict[str, set[str]]:
    """Find the names of the modules that import each module."""
    modules = list_modules()
    importers: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for imported in {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & modules.keys():
                    importers[imported].add(name)
    return importers


def test_folder_has_at_most_14_modules():
    sizes = Counter(path.parent for path in list_modules().values())
    assert {folder.relative_to(ROOT).as_posix(): n for folder, n in sizes.items() if n > MAX_MODULES} == {}


def test_module_has_at_most_350_lines():
    assert {name: n for name, path in list_modules().items() if (n := count_lines(path)) > MAX_LINES} == {}


def test_short_module_has_several_importers_or_is_a_process_boundary():
    """No module imports plug-ins and commands, because entry points load them by name."""
    modules, importers = list_modules(), find_importers()
    short = {name for name, path in modules.items() if count_lines(path) < MIN_LINES and len(importers[name]) == 1}
    assert short <= PROCESS_BOUNDARIES.keys()
    assert PROCESS_BOUNDARIES.keys() <= modules.keys()


def test_median_module_length_exceeds_release_0_1_0(capsys):
    lengths = [count_lines(path) for path in list_modules().values()]
    with capsys.disabled():
        print(f"\n{len(lengths)} modules, median {statistics.median(lengths):.0f} lines, longest {max(lengths)}")
    assert statistics.median(lengths) > 73, "the median of release 0.1.0"


def test_only_vllm_ext_imports_vllm_internals():
    """import-linter sees an external package as one module, so that this rule is a test."""
    users = {
        name
        for name, path in list_modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.v1")
    }
    assert users
    assert [name for name in users if not name.startswith("trimtab.engine.vllm_ext.")] == []

"""The house: names that must not be hidden, and what is on the outside of the package."""

import platform
import subprocess
import sys

import pytest
import yaml
from jsonschema import ValidationError

from tests.support import ROOT

CHECK = "import platform; assert platform.python_version().startswith('3'), platform; print(platform.__file__)"


def test_platform_folder_is_no_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.python_version()


def test_platform_is_the_standard_library_from_the_root():
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout


IN_A_TASK = """
import sys
import ray

ray.init("local", include_dashboard=False, runtime_env={"working_dir": sys.argv[1], "excludes": sys.argv[2:]})

@ray.remote(num_cpus=0)
def where():
    import platform
    import trimtab.jobs
    return platform.__file__, platform.python_version(), trimtab.jobs.__name__

print(*ray.get(where.remote()), sep="\\n")
"""


@pytest.mark.slow
def test_platform_is_the_standard_library_in_a_ray_task_with_the_repository_as_working_directory():
    """A process and a Ray of its own: the working directory belongs to a job."""
    excluded = [".git", ".venv", "mlflow.db", "*.safetensors"]
    script = [sys.executable, "-c", IN_A_TASK, str(ROOT), *excluded]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    file, version, jobs = done.stdout.split()
    assert "working_dir" not in file
    assert version.startswith("3.11")
    assert jobs == "trimtab.jobs"


def test_the_cluster_file_is_one_that_ray_takes():
    """Ray's own schema, and its own filling in of what the file leaves out."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    # `ray up` adds this itself, from the command line.
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(ValidationError):
        validate_config(config | {"max_workers": "many"})

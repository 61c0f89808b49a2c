"""Environment variables of vLLM's engine.

vLLM reads some options only from the environment:

| variable                         | value                    | reason                                                       |
|----------------------------------|--------------------------|--------------------------------------------------------------|
| `VLLM_ENABLE_V1_MULTIPROCESSING` | 0 for one device         | An offline engine runs its core in this process: startup     |
|                                  |                          | takes a fifth of the time, and no process can be orphaned.   |
|                                  |                          | The CPU build accepts the uniprocess executor only so.       |
| `VLLM_USE_V2_MODEL_RUNNER`       | 0 if layers are captured | The capture on the second model runner has not been tested   |
|                                  |                          | on a GPU yet. On a GPU, the user can set 1 to use it.        |
| `VLLM_CPU_KVCACHE_SPACE`         | `cpu_kv_cache_gib` (CPU) | Memory for the KV cache, in GiB.                             |
| `VLLM_CPU_NUM_OF_RESERVED_CPU`   | 0 (CPU)                  | By default, vLLM leaves a core to its scheduler.             |
| `VLLM_LOGGING_LEVEL`             | WARNING (CPU)            | By default, the engine's processes log their startup.        |

The variables marked (CPU) are set for the CPU build only, and a value that the user has set takes precedence.

The variables need to be set only while the engine starts. vLLM 0.29 reads them when it builds its configuration, scheduler and
workers, all of which the constructor of the engine does, and the logging level when a process imports vLLM. Processes of the
engine are started by the constructor, too, and inherit the variables. At the end of its startup, an engine core also caches all
variables of vLLM for its process, so that it does not see later changes of the environment. `engine_environment` clears the
cache of an engine core in this process, because the next engine would read the cached values.
"""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from vllm import envs

from trimtab.engine.config import EngineConfig
from trimtab.engine.vllm_ext.args import is_cpu_build
from trimtab.util.environment import set_variables


def build_engine_environment(config: EngineConfig, user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build the environment variables that an engine needs while it starts.

    Args:
        config: configuration of the engine.
        user: environment of the user. Its values of the CPU build's variables, and its model runner on a GPU, take precedence.

    Returns:
        Values by name of the variable.
    """
    values: dict[str, str] = {}
    if config.tensor_parallel_size == 1:
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config.layers:
        # The second model runner needs a GPU.
        values["VLLM_USE_V2_MODEL_RUNNER"] = "0" if is_cpu_build() else user.get("VLLM_USE_V2_MODEL_RUNNER", "0")
    if is_cpu_build():
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        values |= {name: user.get(name, value) for name, value in defaults.items()}
    return values


@contextmanager
def engine_environment(config: EngineConfig) -> Generator[None]:
    """Set the environment variables of an engine while it starts, and restore their former values afterwards.

    The environment belongs to the whole process: start one engine at a time.

    Args:
        config: configuration of the engine.
    """
    # An engine core in this process has cached the variables, unless it was closed.
    envs.disable_envs_cache()
    with set_variables(build_engine_environment(config)):
        yield

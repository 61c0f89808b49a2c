"""Import hooks in every Python process of a test run: they record the start of each expensive service, and slow steps down.

Python imports this module at its start, because the plugin in `tests/support/starts/plugin.py` puts this folder into
PYTHONPATH. Without the variables of the plugin it does nothing.
"""

import functools
import json
import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LOG = os.environ.get("TRIMTAB_TEST_STARTS")
# While this file exists, a training run waits SLOW_SECONDS before each step, so that a test can stop it between two.
SLOW_FILE = os.environ.get("TRIMTAB_TEST_SLOW_STEPS", "")
SLOW_SECONDS = 2.0


def record_start(kind: str, seconds: float) -> None:
    """Append a start to the log: one write, so that lines of several processes do not mix."""
    line = json.dumps({"kind": kind, "seconds": seconds, "at": time.time()}) + "\n"
    file = os.open(str(LOG), os.O_WRONLY | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)


def slow_down(function: Any) -> Any:
    """Return a function that waits before its call while the file exists."""

    @functools.wraps(function)
    def slowed(*args: Any, **kwargs: Any) -> Any:
        if os.path.exists(SLOW_FILE):  # noqa: PTH110 - `pathlib` would be imported in every process
            time.sleep(SLOW_SECONDS)
        return function(*args, **kwargs)

    return slowed


def wrap(kind: str, function: Any) -> Any:
    """Return a function that records its calls."""

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            record_start(kind, round(time.monotonic() - began, 2))

    return recorded


# Functions by module, each with what wraps it.
FUNCTIONS = {
    "ray._private.node": [(functools.partial(wrap, "ray"), "Node.start_head_processes")],
    "vllm.v1.engine.core": [(functools.partial(wrap, "engine"), "EngineCore.__init__")],
    "ray.train.v2.api.data_parallel_trainer": [(functools.partial(wrap, "fit"), "DataParallelTrainer.fit")],
    "trimtab.serve.server": [(functools.partial(wrap, "server"), "_deploy")],
    "mlflow.server": [(functools.partial(wrap, "mlflow"), "_run_server")],
    "trimtab.jobs.align.worker": [(slow_down, "TrainingLoop.run_step")],
}


class WrappingLoader(Loader):
    """Loader that wraps functions of a module after its import."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for wrap_function, path in FUNCTIONS[self._name]:
            *owners, function = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, function, wrap_function(getattr(owner, function)))


class WrappingFinder(MetaPathFinder):
    """Finder of the modules whose functions are wrapped."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in FUNCTIONS or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        spec.loader = WrappingLoader(spec.loader, name)
        return spec


if LOG:
    sys.meta_path.insert(0, WrappingFinder())

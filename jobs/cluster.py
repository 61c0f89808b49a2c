"""Joining a Ray cluster, or starting a local one for the length of a job."""

import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from trimtab import settings
from trimtab.console import Bar
from trimtab.errors import JobError, TrimtabError, no_space

from . import room
from .board import opened

LOCAL, POLL_SECONDS = "local", 0.5


@contextmanager
def joined(address: str | None) -> Generator[None]:
    """Be connected to a cluster. A Ray that this starts is stopped at the end; one that was there stays."""
    if ray.is_initialized():
        yield
        return
    passed, where = settings.prepare_environment(), address or os.environ.get("RAY_ADDRESS") or LOCAL
    # Its nodes' ports are open to whoever reaches them. One that nobody is to join keeps to the loopback address.
    # Ray has no argument for that, and what starts others later in this process is asked anew.
    several, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, where != LOCAL
    # It tells at each start that token authentication is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        ray.init(
            address=where,
            include_dashboard=False if address is None else None,
            logging_level=logging.WARNING,
            log_to_driver=bool(os.environ.get("TRIMTAB_VERBOSE")),
            runtime_env={"env_vars": passed},
        )
    except (ConnectionError, RayError, ValueError) as error:
        raise JobError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several
    try:
        yield
    finally:
        ray.shutdown()


def run_task(title: str, function: str, *args: Any, cpus: float, gpus: float) -> Any:
    """Run `module:function` in a process of its own on the cluster, which ends with it and gives its memory back.

    The function's first argument is called with (done, total), and moves a progress bar here. Named by text, so that this
    process need not import what the function needs.
    """
    room.check(title, cpus, gpus)
    board = opened()
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=1)(_with_progress)
    reference = task.remote(function, board, *args)
    try:
        with Bar(title) as bar:
            while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
                reading: ray.ObjectRef[dict[str, Any]] = board.read.remote()
                latest = ray.get(reading)
                if latest:
                    bar.update(latest["done"], latest["total"])
        return ray.get(reference)
    except RayError as error:
        raise cause(error) from error
    except KeyboardInterrupt:
        ray.cancel(reference, force=True)
        raise


def _with_progress(function: str, board: Any, *args: Any) -> Any:
    module, _, name = function.partition(":")
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            board.push.remote({"done": done, "total": total})

    return getattr(import_module(module), name)(tell, *args)


def cause(error: BaseException) -> TrimtabError:
    """The error of ours that lies behind what Ray raised, else a JobError with its last line."""
    seen: BaseException | None = error
    while seen is not None:
        # First, because Ray's own error is of its cause's type too, with the traceback as its text.
        inner = getattr(seen, "cause", None)
        if isinstance(inner, TrimtabError):
            return inner
        if isinstance(seen, TrimtabError):
            return seen
        failures = getattr(seen, "worker_failures", None)
        if failures:
            seen = next(iter(failures.values()))
            continue
        seen = seen.__cause__
    if full := no_space(error):
        return full
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return JobError(f"the job failed on the cluster: {lines[-1].strip() if lines else type(error).__name__}")


def cpus_for_all() -> float:
    """All CPU cores of the largest node, for work that runs alone."""
    return max((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]), default=1.0)

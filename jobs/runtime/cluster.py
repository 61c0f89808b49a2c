"""What a job does on Ray: be connected for its length, run a function in its own process, name the cause of a failure."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import RayError

from trimtab.cli.console import ProgressBar
from trimtab.errors import JobError, TrimtabError, as_no_space_error
from trimtab.jobs.runtime.control_actor import get_or_create
from trimtab.ray_connection import check_resources, connect_to_ray, find_missing_resources

POLL_SECONDS = 0.5


@contextmanager
def ray_session(address: str | None) -> Generator[None]:
    """Be connected to a cluster. A Ray that this starts is stopped at the end; one that was there stays."""
    ours = connect_to_ray(address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def run_task(title: str, function: str, *args: Any, cpus: float, gpus: float) -> Any:
    """Run `module:function` in a process of its own on the cluster, which ends with it and gives its memory back.

    The function's first argument is called with (done, total), and moves a progress bar here. Named by text, so that this
    process need not import what the function needs.
    """
    (found,) = stream_task(title, function, *args, cpus=cpus, gpus=gpus)
    return found


def stream_task(title: str, function: str, *args: Any, cpus: float, gpus: float) -> Generator[Any]:
    """As `run_task`, of a function that yields: each part comes while the next is made. Closing it ends the task."""
    check_resources(title, cpus, gpus)
    board = get_or_create()
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=1, num_returns="streaming")(_with_progress)
    parts = task.remote(function, board, *args)
    try:
        with ProgressBar(title) as bar:
            while True:
                while not ray.wait([parts], timeout=POLL_SECONDS)[0]:
                    _show(bar, board, cpus, gpus)
                part = next(parts, None)
                if part is None:
                    return
                yield ray.get(part)
    except RayError as error:
        raise unwrap_ray_error(error) from error
    except (KeyboardInterrupt, GeneratorExit):
        ray.cancel(parts, force=True)
        raise


def _show(bar: ProgressBar, board: Any, cpus: float, gpus: float) -> None:
    """How far the task is, or what it waits for before it starts."""
    reading: ray.ObjectRef[dict[str, Any]] = board.read.remote()
    latest = ray.get(reading)
    if latest:
        bar.update(latest["done"], latest["total"])
    elif short := find_missing_resources(cpus, gpus):
        bar.update(0, note=f"| waits for nodes: it takes {short}")


def _with_progress(function: str, board: Any, *args: Any) -> Iterator[Any]:
    module, _, name = function.partition(":")
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            board.push.remote({"done": done, "total": total})

    found = getattr(import_module(module), name)(tell, *args)
    if isinstance(found, Generator):
        yield from found
    else:
        yield found


def unwrap_ray_error(error: BaseException) -> TrimtabError:
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
    if full := as_no_space_error(error):
        return full
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return JobError(f"the job failed on the cluster: {lines[-1].strip() if lines else type(error).__name__}")

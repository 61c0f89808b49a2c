"""Ray session of a job, isolated tasks with a progress bar, and translation of Ray errors."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import RayError

from trimtab.cli.console import ProgressBar
from trimtab.errors import JobError, TrimtabError, as_no_space_error
from trimtab.jobs.runtime.control_actor import get_or_create_actor
from trimtab.ray_connection import check_resources, connect_to_ray, find_missing_resources

# Interval at which drivers look for results, progress and Ctrl-C.
POLL_SECONDS = 0.5


@contextmanager
def ray_session(address: str | None) -> Generator[None]:
    """Connect to a Ray cluster for the duration of the context.

    The connection is closed at the end, and a local Ray that it started is stopped. An existing connection is left open.

    Args:
        address: address of the cluster; None for RAY_ADDRESS or a local Ray.

    Raises:
        JobError: if the connection fails.
    """
    connected = connect_to_ray(address)
    try:
        yield
    finally:
        if connected:
            ray.shutdown()


def run_task(title: str, function: str, *args: Any, cpus: float, gpus: float) -> Any:
    """Run a function in a separate process on the cluster; the process exits with it and releases its memory.

    Args:
        title: title of the progress bar.
        function: function as `module:function`, so that the driver does not import its dependencies. Its first argument is a
            callback that takes (done, total) and updates the progress bar.
        args: further arguments of the function.
        cpus: number of CPU cores.
        gpus: number of GPUs.

    Returns:
        The return value of the function.

    Raises:
        TrimtabError: if the function raises it.
        JobError: if the task fails for another reason.
        UsageError: if a local Ray has too few resources.
    """
    (result,) = stream_task(title, function, *args, cpus=cpus, gpus=gpus)
    return result


def stream_task(title: str, function: str, *args: Any, cpus: float, gpus: float) -> Generator[Any]:
    """Run a generator function like `run_task`, and yield each item while the next one is computed.

    Closing the generator cancels the task. Arguments and errors are those of `run_task`.
    """
    check_resources(title, cpus, gpus)
    control = get_or_create_actor()
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=1, num_returns="streaming")(_with_progress)
    items = task.remote(function, control, *args)
    try:
        with ProgressBar(title) as bar:
            while True:
                while not ray.wait([items], timeout=POLL_SECONDS)[0]:
                    _update_bar(bar, control, cpus, gpus)
                item = next(items, None)
                if item is None:
                    return
                yield ray.get(item)
    except RayError as error:
        raise unwrap_ray_error(error) from error
    except (KeyboardInterrupt, GeneratorExit):
        ray.cancel(items, force=True)
        raise


def _update_bar(bar: ProgressBar, control: Any, cpus: float, gpus: float) -> None:
    """Show the progress of the task, or the missing resources before it starts."""
    reading: ray.ObjectRef[dict[str, Any]] = control.read.remote()
    latest = ray.get(reading)
    if latest:
        bar.update(latest["done"], latest["total"])
    elif missing := find_missing_resources(cpus, gpus):
        bar.update(0, note=f"| waits for nodes: needs {missing}")


def _with_progress(function: str, control: Any, *args: Any) -> Iterator[Any]:
    module, _, name = function.partition(":")
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            control.push.remote({"done": done, "total": total})

    result = getattr(import_module(module), name)(report, *args)
    if isinstance(result, Generator):
        yield from result
    else:
        yield result


def unwrap_ray_error(error: BaseException) -> TrimtabError:
    """Return the TrimtabError that caused a Ray error.

    Returns:
        The TrimtabError in the chain of causes, a NoSpaceError if a disk is full, else a JobError with the last line of the
        Ray error.
    """
    current: BaseException | None = error
    while current is not None:
        # `cause` is checked first: RayTaskError also subclasses the type of its cause, but its text is the traceback.
        cause = getattr(current, "cause", None)
        if isinstance(cause, TrimtabError):
            return cause
        if isinstance(current, TrimtabError):
            return current
        failures = getattr(current, "worker_failures", None)
        if failures:
            current = next(iter(failures.values()))
            continue
        current = getattr(current, "controller_failure", None) or current.__cause__
    if full := as_no_space_error(error):
        return full
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return JobError(f"the job failed on the cluster: {lines[-1].strip() if lines else type(error).__name__}")

"""Entry point of Ray Train workers, and the MLflow callback of the Ray Train controller.

The controller imports this module before it starts the first worker. The training module and its input are therefore loaded
only in the worker, which keeps torch out of the controller.
"""

from importlib import import_module
from typing import Any

import ray
from ray.train import Checkpoint, UserCallback

from trimtab.errors import DivergedError, UsageError
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.tracking.runs import TrackedRun


def run_worker(settings: dict[str, Any]) -> None:
    """Run the training loop.

    Args:
        settings: train loop config of Ray Train; `work` is a reference to the `TrainingWork` in the Ray object store.
    """
    import_module("trimtab.jobs.align.worker").run_worker(ray.get(settings["work"]))


# Prefix of the metric names of training curves.
CURVES = "train/"


class MlflowCallback(UserCallback):
    """Ray Train callback that logs the metrics of each step to MLflow.

    It runs in the Ray Train controller. An outage of MLflow delays the metrics but does not lose them.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Log a report of all workers.

        Worker 0 reports the steps since the last report, and one worker of each node reports its system metrics. A tag records
        that prefix-tree batching was not available.
        """
        self.run.log_curves(metrics[0].get("history", []), CURVES)
        nodes = {name: value for reported in metrics for name, value in reported.get("node", {}).items()}
        if nodes:
            self.run.log_metrics(nodes, int(metrics[0]["step"]))
        if not metrics[0].get("prefix_tree", True):
            self.run.set_tags({"trimtab.prefix_tree": "unavailable"})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record failed workers as a tag of the run, before Ray Train restarts them.

        Raises:
            UsageError, DivergedError: the error of a worker, if a restart cannot help. Ray Train then ends the run at once.
        """
        self.run.set_tags({"trimtab.last_failure": f"workers {sorted(worker_exceptions)}"})
        for exception in worker_exceptions.values():
            error = unwrap_ray_error(exception)
            if isinstance(error, UsageError | DivergedError):
                raise error

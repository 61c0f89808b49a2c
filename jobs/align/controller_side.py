"""What Ray Train starts in each worker.

Train's controller holds this function too, and would import all of training before it starts the first worker; so the module
and what it works on are looked up in the worker.
"""

from importlib import import_module
from typing import Any

import ray
from ray.train import Checkpoint, UserCallback

from trimtab.tracking.runs import TrackedRun


def run_worker(settings: dict[str, Any]) -> None:
    """Run training on the `work` that the driver put into Ray's store."""
    import_module("trimtab.jobs.align.worker").run_worker(ray.get(settings["work"]))


# What the names of the curves begin with.
CURVES = "train/"


class MlflowCallback(UserCallback):
    """Sends each step's losses to the run. Runs in Train's controller, beside the driver; an outage of MLflow only delays."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called when all workers have reported; worker 0 brings the steps since the last report, and
        one worker of each node how busy it is."""
        self.run.log_curves(metrics[0].get("history", []), CURVES)
        nodes = {name: value for reported in metrics for name, value in reported.get("node", {}).items()}
        if nodes:
            self.run.log_metrics(nodes, int(metrics[0]["step"]))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called when workers failed, before they are started again."""
        self.run.set_tags({"trimtab.last_failure": f"workers {sorted(worker_exceptions)}"})

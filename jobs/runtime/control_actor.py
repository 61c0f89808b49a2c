"""The board: a small Ray actor between the workers and whoever started the job, for progress one way and a stop the other."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def format_actor_name(run_id: str) -> str:
    """The name under which others find the board of a training run while it lasts."""
    return f"board of {run_id}"


@ray.remote(num_cpus=0)
class ControlActor:
    """Holds the latest line of progress, and whether the user asked to stop."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False

    def push(self, values: dict[str, Any]) -> bool:
        """Take the latest values; answers whether to stop."""
        self._latest = values
        return self._stop

    def read(self) -> dict[str, Any]:
        """The latest values."""
        return self._latest

    def stop(self) -> None:
        """Ask the workers to stop after the step they are in."""
        self._stop = True


def get_or_create(name: str | None = None) -> Any:
    """A board on the node of whoever asks: it goes with them, and not with a node that leaves."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ControlActor.options(name=name, scheduling_strategy=here).remote()

"""Control actor of a job: it passes progress from the workers to the driver, and stop requests back."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def format_actor_name(run_id: str) -> str:
    """Return the Ray actor name of the control actor of a training run."""
    return f"control actor of {run_id}"


@ray.remote(num_cpus=0)
class ControlActor:
    """Ray actor that holds the latest progress and the stop request of a job."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._stop = False

    def push(self, values: dict[str, Any]) -> bool:
        """Store the latest progress values.

        Returns:
            Whether a stop was requested.
        """
        self._latest = values
        return self._stop

    def read(self) -> dict[str, Any]:
        """Return the latest progress values; empty before the first `push`."""
        return self._latest

    def stop(self) -> None:
        """Request the workers to stop after the current step."""
        self._stop = True


def get_or_create_actor(name: str | None = None) -> Any:
    """Create a control actor on the node of the caller, so that it survives the loss of any other node.

    Args:
        name: Ray actor name, None for an anonymous actor.

    Returns:
        Handle of the actor.
    """
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ControlActor.options(name=name, scheduling_strategy=this_node).remote()

"""What Ray Train starts in each worker.

Train's controller holds this function too, and would import all of training before it starts the first worker; so the module
and what it works on are looked up in the worker.
"""

from importlib import import_module
from typing import Any

import ray


def worker(settings: dict[str, Any]) -> None:
    """Run training on the `work` that the driver put into Ray's store."""
    import_module("trimtab.jobs.training").worker(ray.get(settings["work"]))

"""How busy a node is, by the names that MLflow shows beside a run's other figures, and what a worker itself held at most."""

import resource
import sys

import psutil
import torch
from ray import train

MIB, GIB = 1 << 20, 1 << 30
# What the system counts a process's memory in.
COUNTED = 1 if sys.platform == "darwin" else 1 << 10


def read() -> dict[str, float]:
    """Figures of this worker's node, `system/<node>/…`; nothing from all but one of its workers. The processor's is the mean
    since the last call."""
    context = train.get_context()
    if context.get_local_rank() != 0:
        return {}
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / MIB,
        "system_memory_usage_percentage": memory.percent,
    }
    if torch.cuda.is_available():
        # Of all devices of the node that this worker sees, by whoever uses them.
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / MIB
    return {f"system/node_{context.get_node_rank()}/{name}": value for name, value in found.items()}


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: of its GPU, or of the machine where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * COUNTED / GIB

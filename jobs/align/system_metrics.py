"""System metrics of a training worker: utilization of its node, by MLflow's names, and its own peak memory."""

import resource
import sys

import psutil
import torch
from ray import train

MIB, GIB = 1 << 20, 1 << 30
# Unit of `ru_maxrss` in bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1 << 10


def read_node_metrics() -> dict[str, float]:
    """Read the utilization of this worker's node.

    Returns:
        Metrics by the name `system/<node>/<metric>`; empty for all but one worker of each node. CPU utilization is the mean
        since the last call.
    """
    context = train.get_context()
    if context.get_local_rank() != 0:
        return {}
    memory = psutil.virtual_memory()
    metrics = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / MIB,
        "system_memory_usage_percentage": memory.percent,
    }
    if torch.cuda.is_available():
        # Memory of all visible devices, used by any process.
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            metrics[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / MIB
    return {f"system/node_{context.get_node_rank()}/{name}": value for name, value in metrics.items()}


def get_peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: of the GPU, or of the host if `device` is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB

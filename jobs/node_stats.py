"""How busy a node is, by the names that MLflow shows beside a run's other figures."""

import psutil
import torch
from ray import train

MIB = 1 << 20


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

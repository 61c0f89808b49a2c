"""CPU time and memory of a process and all of its children, such as those of a server."""

from collections import defaultdict
from collections.abc import Mapping

import psutil
from peers.processes import MEGABYTE, name_process


def read_cpu_seconds(pid: int) -> dict[str, float]:
    """Return the CPU time that the running processes have used, by their role."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in list_processes(pid):
        try:
            command, used = " ".join(process.cmdline()) or process.name(), process.cpu_times()
        except psutil.Error:
            continue
        seconds[name_process(command)] += used.user + used.system
    return dict(seconds)


def divide_increase(before: Mapping[str, float], after: Mapping[str, float], divisor: float) -> dict[str, float]:
    """Return the increase of the CPU time by role, divided by seconds or by numbers of tokens."""
    return {role: (seconds - before.get(role, 0.0)) / divisor for role, seconds in after.items()}


def measure_memory(pid: int) -> float:
    """Return the memory that belongs to the processes alone (USS), in MB."""
    total = 0
    for process in list_processes(pid):
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / MEGABYTE


def list_processes(pid: int) -> list[psutil.Process]:
    """List a process and all of its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]

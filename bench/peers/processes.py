"""Memory, file descriptors and threads of a server's processes over time, and the slopes of their memory."""

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil
from scipy import stats

from trimtab.stats.intervals import Interval

MEGABYTE = 1e6
# Names of Ray's processes hold ids; names of programs are their first words.
ROLES = {
    r"ServeReplica.*engine": "replica",
    r"ServeReplica.*agreement": "coordinator",
    r"ServeController": "controller",
    r"Proxy|haproxy": "proxy",
    r"EngineCore": "engine core",
    r"gcs_server": "gcs",
    r"raylet/raylet": "raylet",
    r"dashboard/agent|DashboardAgent": "dashboard agent",
    r"runtime_env": "runtime env agent",
    r"dashboard": "dashboard",
    r"log_monitor": "log monitor",
    r"monitor": "autoscaler monitor",
    r"trimtab serve|-m trimtab": "trimtab serve",
}


@dataclass(frozen=True)
class Sample:
    """State of a process: seconds since the start, unique memory in bytes, file descriptors and threads."""

    at: float
    memory: int
    descriptors: int
    threads: int


@dataclass
class ProcessSamples:
    """Samples of all processes below a parent, by process id."""

    parent: int
    began: float = field(default_factory=time.monotonic)
    names: dict[int, str] = field(default_factory=dict[int, str])
    samples: defaultdict[int, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def take(self) -> None:
        """Take a sample of each process."""
        parent, at = psutil.Process(self.parent), time.monotonic() - self.began
        for process in [parent, *parent.children(recursive=True)]:
            try:
                with process.oneshot():
                    command = " ".join(process.cmdline()) or process.name()
                    memory = process.memory_full_info().uss
                    sample = Sample(at, memory, process.num_fds(), process.num_threads())
            except psutil.Error:
                continue
            self.names.setdefault(process.pid, name_process(command))
            self.samples[process.pid].append(sample)

    def list_lasting(self, since: float) -> dict[str, list[Sample]]:
        """Return the samples after `since` seconds of the processes that lived until the end, by role and number."""
        last = max(samples[-1].at for samples in self.samples.values())
        lasting: dict[str, list[Sample]] = {}
        counts: defaultdict[str, int] = defaultdict(int)
        for pid, samples in sorted(self.samples.items()):
            selected = [sample for sample in samples if sample.at >= since]
            if len(selected) > 2 and samples[-1].at == last:
                counts[self.names[pid]] += 1
                lasting[f"{self.names[pid]} {counts[self.names[pid]]}"] = selected
        return lasting


def name_process(command: str) -> str:
    """Return the role of a process by its command line."""
    return next((role for pattern, role in ROLES.items() if re.search(pattern, command)), command.split()[0][-30:])


def estimate_slope(samples: list[Sample]) -> Interval:
    """Estimate the growth of the memory in MB per minute, by Theil and Sen, robustly against steps such as a collection."""
    minutes, megabytes = [s.at / 60 for s in samples], [s.memory / MEGABYTE for s in samples]
    result = stats.theilslopes(megabytes, minutes)
    return Interval(float(result.slope), float(result.low_slope), float(result.high_slope))

"""Ray cluster of a head and three worker nodes, simulated by processes on one machine."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray._private.node import Node
from ray.cluster_utils import Cluster

from trimtab.util import ports

WORKERS = 3


@dataclass(frozen=True)
class RayNodes:
    """Cluster, its worker nodes of one CPU each, and the URL of the dashboard. The head has no CPUs."""

    cluster: Cluster
    workers: list[Node]
    address: str


@contextmanager
def start_ray_nodes() -> Generator[RayNodes]:
    """Start the cluster and yield it; shut it down at the end."""
    dashboard, agent = ports.find_free_ports(2)
    path = os.environ["PATH"]
    # The nodes must use the Python that has trimtab installed.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
        cluster.wait_for_nodes()
        yield RayNodes(cluster, workers, f"http://127.0.0.1:{dashboard}")
    finally:
        cluster.shutdown()
        os.environ["PATH"] = path

"""Ray cluster of a head and three worker nodes, simulated by processes on one machine."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray._private import services
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

    def add_worker(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=1, node_ip_address=get_machine_address()))

    def kill_worker(self) -> None:
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)


def get_machine_address() -> str:
    """Return the address of this machine; Ray's default is loopback in a process that is connected to a local node."""
    return services.node_ip_address_from_perspective(None)


@contextmanager
def start_ray_nodes() -> Generator[RayNodes]:
    """Start the cluster and yield it; shut it down at the end."""
    dashboard, agent = ports.find_free_ports(2)
    path = os.environ["PATH"]
    # The nodes must use the Python that has trimtab installed.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
    head["node_ip_address"] = get_machine_address()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = RayNodes(cluster, [], f"http://127.0.0.1:{dashboard}")
        for _ in range(WORKERS):
            nodes.add_worker()
        cluster.wait_for_nodes()
        yield nodes
    finally:
        cluster.shutdown()
        os.environ["PATH"] = path

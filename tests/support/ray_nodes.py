"""A cluster of three nodes that are processes of this machine, with Ray's own means for it."""

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
class Nodes:
    """A head without cores, workers of one core each, and the dashboard's address."""

    cluster: Cluster
    workers: list[Node]
    address: str


@contextmanager
def nodes() -> Generator[Nodes]:
    """The cluster while it is up."""
    dashboard, agent = ports.find_free_ports(2)
    path = os.environ["PATH"]
    # The nodes' python is the one that has trimtab.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
        cluster.wait_for_nodes()
        yield Nodes(cluster, workers, f"http://127.0.0.1:{dashboard}")
    finally:
        cluster.shutdown()
        os.environ["PATH"] = path

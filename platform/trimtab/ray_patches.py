"""Serve's replicas kept to this machine where all of Ray is.

A replica takes calls of other replicas at a port of its own, and unpickles them. Ray has it listen on every interface, whatever
the node's address is.
"""

import ipaddress
from typing import Any

import ray
from ray.serve._private import replica as serve_replica


def keep_local() -> None:
    """In a replica, before it is ready: let that port listen on the node's address where this is a loopback address."""
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        return
    module: Any = serve_replica
    listen = module.add_port_to_grpc_server

    def listen_here(server: Any, asked: str) -> int:
        return listen(server, asked.replace("[::]", address))

    module.add_port_to_grpc_server = listen_here

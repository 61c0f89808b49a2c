"""Ports of this machine that nothing takes in the meantime."""

import random
import socket

# Below the range that the system gives to outgoing connections and to servers that ask for any port: Ray takes dozens of
# those while it starts. Also clear of Ray's workers (10002-19999) and of Serve's replicas (from 30000).
RANGE = range(20_000, 29_000)


def find_free_ports(count: int = 1, host: str = "127.0.0.1") -> list[int]:
    """`count` different ports at which `host` can listen. Raises RuntimeError where too few are left."""
    found: list[int] = []
    for port in random.sample(RANGE, len(RANGE)):
        if explain_unavailable_port(host, port) is None:
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between {RANGE.start} and {RANGE.stop}; stop what listens there")


def explain_unavailable_port(host: str, port: int) -> str | None:
    """None where `host` can listen at `port`, else why not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None

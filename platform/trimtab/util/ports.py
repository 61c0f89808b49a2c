"""Search for free TCP ports outside the ranges of Ray and of the operating system."""

import random
import socket

# Below the ephemeral range, from which the system assigns ports to outgoing connections and to servers that bind port 0:
# Ray takes dozens of those while it starts. Also outside the ranges of Ray's workers (10002-19999) and of Serve's replicas
# (from 30000).
RANGE = range(20_000, 29_000)


def find_free_ports(count: int = 1, host: str = "127.0.0.1") -> list[int]:
    """Return `count` different ports on which `host` can listen.

    Raises:
        RuntimeError: if fewer ports are free.
    """
    free: list[int] = []
    for port in random.sample(RANGE, len(RANGE)):
        if explain_unavailable_port(host, port) is None:
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"fewer than {count} free ports between {RANGE.start} and {RANGE.stop}. Stop the servers that use them")


def explain_unavailable_port(host: str, port: int) -> str | None:
    """Return why `host` cannot listen on `port`, or None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None

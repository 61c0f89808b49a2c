"""Network sockets of child processes."""

import ipaddress

import psutil


def find_public_listeners() -> list[tuple[str, int]]:
    """Return name and port of each child process that listens on an address other than loopback."""
    listeners = []
    for process in psutil.Process().children(recursive=True):
        try:
            sockets = process.net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        addresses = [socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN]
        listeners += [(process.name(), address.port) for address in addresses if not is_loopback(address.ip)]
    return listeners


def is_loopback(address: str) -> bool:
    """Return whether an address is loopback, also in IPv4-mapped IPv6 form, which Ray's servers use."""
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback

"""Where processes listen."""

import ipaddress

import psutil


def beyond_this_machine() -> list[tuple[str, int]]:
    """Processes that this one started and that other machines can reach: their name and port."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            sockets = process.net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        listening = [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]
        found += [(process.name(), at.port) for at in listening if not loopback(at.ip)]
    return found


def loopback(address: str) -> bool:
    """Also for an IPv4 address as IPv6 has it, which Ray's servers listen on."""
    given = ipaddress.ip_address(address)
    return (getattr(given, "ipv4_mapped", None) or given).is_loopback

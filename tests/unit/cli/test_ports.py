"""Free ports for Ray, and explanations of ports in use."""

import socket
from pathlib import Path

import pytest

from trimtab.serve.server import _find_reason
from trimtab.util import ports

PORT_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_free_ports_are_distinct_and_usable():
    free_ports = ports.find_free_ports(50)
    assert len(set(free_ports)) == 50
    with socket.create_server(("127.0.0.1", free_ports[0])):
        assert ports.explain_unavailable_port("127.0.0.1", free_ports[0]) == "Address already in use"
    assert ports.explain_unavailable_port("127.0.0.1", free_ports[0]) is None


@pytest.mark.skipif(not PORT_RANGE_FILE.exists(), reason="this system does not publish its ephemeral port range")
def test_free_ports_are_outside_the_ephemeral_range():
    lowest = int(PORT_RANGE_FILE.read_text().split()[0])
    assert ports.RANGE.stop <= lowest


def test_reason_names_a_port_in_use():
    lines = ["[NOTICE] version", "[ALERT] cannot bind socket (Address already in use) [127.0.0.1:80]", "[ALERT] Exiting."]
    assert _find_reason("\n".join(lines)) == lines[1]
    assert _find_reason("a\n\nb\n") == "b"
    assert _find_reason("") == "no reason given"

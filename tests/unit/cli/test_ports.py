"""Ports that stay free while Ray starts."""

import socket
from pathlib import Path

import pytest

from trimtab.serve.server import _find_reason
from trimtab.util import ports

SYSTEM = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_ports_are_different_and_can_be_listened_at():
    found = ports.find_free_ports(50)
    assert len(set(found)) == 50
    with socket.create_server(("127.0.0.1", found[0])):
        assert ports.explain_unavailable_port("127.0.0.1", found[0]) == "Address already in use"
    assert ports.explain_unavailable_port("127.0.0.1", found[0]) is None


@pytest.mark.skipif(not SYSTEM.exists(), reason="this system does not tell the range of its own ports")
def test_the_system_gives_none_of_them_to_others():
    lowest = int(SYSTEM.read_text().split()[0])
    assert ports.RANGE.stop <= lowest


def test_a_port_that_was_taken_meanwhile_is_named():
    said = ["[NOTICE] version", "[ALERT] cannot bind socket (Address already in use) [127.0.0.1:80]", "[ALERT] Exiting."]
    assert _find_reason("\n".join(said)) == said[1]
    assert _find_reason("a\n\nb\n") == "b"
    assert _find_reason("") == "no reason given"

"""Network interfaces that a server with the default options listens on."""

from tests.support.sockets import find_public_listeners


def test_only_haproxy_status_ports_are_public(url):
    listeners = find_public_listeners()
    # Two ports with HAProxy's metrics and state, whose address cannot be set: docs/serve.md.
    assert {name for name, _ in listeners} <= {"haproxy"}, listeners
    assert len(set(listeners)) <= 2

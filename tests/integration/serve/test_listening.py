"""Who can reach a server that was not told to listen elsewhere: this machine alone."""

from tests.support.sockets import beyond_this_machine


def test_nothing_of_a_server_is_reached_from_elsewhere_but_what_haproxy_says_of_itself(url):
    found = beyond_this_machine()
    # Two ports without a prompt or an answer, which Ray lets nobody move: docs/serve.md.
    assert {name for name, _ in found} <= {"haproxy"}, found
    assert len(set(found)) <= 2

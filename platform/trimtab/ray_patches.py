"""Register of every Ray symbol that trimtab replaces.

It lives in the library because jobs and the server both connect to Ray. No two patches replace the same symbol.
"""

import ipaddress
from collections.abc import Callable, Generator, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray

from trimtab.errors import IncompatibleLibraryError
from trimtab.util.patching import PatchRegister, Symbol, replace_attribute

VERSIONS = "2.60.0"
REGISTER = PatchRegister("ray", "ray")
RETRY_ON = "RAY_SERVE_HAPROXY_RETRY_ON"
HAPROXY_OPTIONS = "\n    ".join(
    (
        "conn-failure empty-response",
        # HAProxy does not see that a client has gone while it splices its request, and the engine would go on generating.
        "no option splice-request",
        # Connections without a complete request must not use up HAProxy; without the second line, idle ones would end as well.
        "timeout http-request 30s",
        "timeout http-keep-alive 300s",
    )
)
RETRY_LINE = "retry-on {{ config.retry_on }}"


@contextmanager
@REGISTER.add(
    Symbol("ray._private.ray_constants:ENABLE_RAY_CLUSTER"),
    Symbol("ray._private.services:get_node_ip_address", ("address",)),
    upstream="https://github.com/ray-project/ray/pull/59852, which binds to the node's address; `ray.init` cannot choose it",
    versions=VERSIONS,
    remove_when="`ray.init` takes the address of the local node",
)
def patch_node_address(*, loopback: bool) -> Generator[None]:
    """Let `ray.init` inside this context start its node on the loopback address, if `loopback`.

    The ports of a Ray node are open to everyone who reaches its address. A node that no other machine joins
    needs only loopback.
    """
    REGISTER.check("patch_node_address")
    constants: Any = import_module("ray._private.ray_constants")
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, not loopback
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
@REGISTER.add(
    Symbol("ray._private.node:Node.start_log_monitor", ("self",)),
    upstream="none: `ray.init` starts a log monitor although `log_to_driver` is false",
    versions=VERSIONS,
    remove_when="`ray.init(log_to_driver=False)` starts no log monitor",
)
def patch_log_monitor(*, needed: bool) -> Generator[None]:
    """Let `ray.init` inside this context start no log monitor, unless it is needed.

    The log monitor sends the output of workers to drivers. It lists the files of the logs ten times a second.
    """
    REGISTER.check("patch_log_monitor")
    node: Any = import_module("ray._private.node").Node
    start = node.start_log_monitor

    def start_nothing(_: Any) -> None: ...

    if not needed:
        node.start_log_monitor = start_nothing
    try:
        yield
    finally:
        node.start_log_monitor = start


@REGISTER.add(
    Symbol("ray.serve._private.replica:add_port_to_grpc_server", ("server", "address")),
    upstream="https://github.com/ray-project/ray/pull/59908, which listens at [::]:0",
    versions=VERSIONS,
    remove_when="a Serve replica listens on the address of its node",
)
def patch_replica_address() -> None:
    """Let the gRPC port of this Serve replica listen on the node's address, if that is a loopback address.

    A replica unpickles the calls that arrive at this port. Serve lets it listen on every interface.
    """
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        return
    REGISTER.check("patch_replica_address")

    def wrap(add_port: Callable[..., int]) -> Callable[..., int]:
        def patched(server: Any, requested: str) -> int:
            return add_port(server, requested.replace("[::]", address))

        return patched

    # Imported lazily: it imports all of Serve, which jobs do without.
    replace_attribute(import_module("ray.serve._private.replica"), "add_port_to_grpc_server", "patch_replica_address", wrap)


@REGISTER.add(
    Symbol("uvicorn.protocols.http.httptools_impl:RequestResponseCycle.send", ("self", "message")),
    upstream="https://github.com/Kludex/uvicorn/pull/1360, closed: uvicorn, which Serve uses, sends chunks to every client",
    versions=VERSIONS,
    remove_when="uvicorn answers a stream to an HTTP/1.0 client without chunked encoding",
)
def patch_http10_streams() -> None:
    """Send a response without a content length to an HTTP/1.0 client as it is, until the connection closes.

    HTTP/1.0 has no chunked encoding; nginx and ApacheBench use it by default.
    """
    REGISTER.check("patch_http10_streams")
    cycle: Any = import_module("uvicorn.protocols.http.httptools_impl").RequestResponseCycle

    def wrap(send: Callable[..., Any]) -> Callable[..., Any]:
        async def patched(self: Any, message: Any) -> None:
            if self.scope["http_version"] == "1.0":
                if message["type"] == "http.response.start":
                    names = {name.lower() for name, _ in message.get("headers", [])}
                    self.trimtab_has_no_length = b"content-length" not in names
                    if self.trimtab_has_no_length:
                        self.chunked_encoding = self.keep_alive = False
                elif self.trimtab_has_no_length:
                    self.expected_content_length = len(message.get("body", b""))
            await send(self, message)

        return patched

    replace_attribute(cycle, "send", "patch_http10_streams", wrap)


@REGISTER.add(
    Symbol("ray.serve._private.haproxy_templates:HAPROXY_CONFIG_TEMPLATE"),
    upstream="none: Serve has no settings for `option splice-request` and `timeout http-request`",
    versions=VERSIONS,
    remove_when="Serve can turn off splicing of requests, and set these timeouts",
)
def patch_haproxy_options(environment: MutableMapping[str, str]) -> None:
    """Add options to Serve's HAProxy: retry a request whose replica died before its response, do not splice requests, and close
    connections without a complete request.

    Serve inserts the variable as it is into the configuration, so that it can hold further lines. A value that the user has set
    stays.

    Raises:
        IncompatibleLibraryError: if Serve's template does not insert the variable.
    """
    REGISTER.check("patch_haproxy_options")
    template: str = import_module("ray.serve._private.haproxy_templates").HAPROXY_CONFIG_TEMPLATE
    if RETRY_LINE not in template:
        raise IncompatibleLibraryError(
            f"patch_haproxy_options: the HAProxy template of this Ray has no line {RETRY_LINE!r}. Install ray {VERSIONS}"
        )
    environment.setdefault(RETRY_ON, HAPROXY_OPTIONS)

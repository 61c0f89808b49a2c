"""Connection to Ray: joining a cluster or starting a local node, and resource checks."""

import ipaddress
import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from trimtab import settings
from trimtab.errors import JobError, UsageError
from trimtab.ray_patches import patch_log_monitor, patch_node_address
from trimtab.util.termination import preserve_handlers

LOCAL = "local"
# Characters that a path of a socket may have, and those that Ray adds to its temporary folder.
MAX_SOCKET_PATH = 107
RAY_SOCKET = f"/trimtab-{os.getuid()}/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# The local machine is never preempted, so that Ray Train does not need a process that watches for preemption. With its default
# interval of two seconds, Ray Train would notice the end of a short run late.
ON_ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
# Variables of the processes of a local node. Without a dashboard, nothing reads their statistics; with Ray's defaults they take
# twice the CPU time.
OF_LOCAL_NODE = {
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def connect_to_ray(address: str | None, environment: Mapping[str, str] | None = None) -> bool:
    """Connect to a Ray cluster, or start a node on this machine.

    Args:
        address: address of the cluster. None stands for RAY_ADDRESS, or a local node if that is not set.
        environment: additional environment variables for the processes that Ray starts for this driver.

    Returns:
        True if this call connected, in which case the caller must call `ray.shutdown`; False if a connection existed.

    Raises:
        UsageError: if the path of the temporary folder is too long for Ray's sockets.
        JobError: if the cluster is not reachable or the node does not start.
    """
    if ray.is_initialized():
        return False
    variables, target = settings.prepare_environment(), get_address(address)
    options: dict[str, Any] = {}
    if target == LOCAL:
        _check_temporary_folder()
        variables |= ON_ONE_MACHINE
        for name, value in OF_LOCAL_NODE.items():
            os.environ.setdefault(name, value)
        folder = settings.get_private_folder()
        options["_temp_dir"] = str(folder)
        # With Serve's fixed folder, every user could control HAProxy through its socket, and a second one could start none.
        files = {key: str(folder / "haproxy" / name) for key, name in settings.PROXY_FILES.items()}
        variables |= {key: os.environ.get(key, path) for key, path in files.items()}
        # Without it, Ray uses one token for all local nodes, in a file that other users may be able to read.
        if not any(name in os.environ for name in TOKEN_VARIABLES):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    shows_logs = bool(os.environ.get("TRIMTAB_VERBOSE"))
    # This logger reports at each start that token authentication is enabled.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        with (
            patch_node_address(loopback=target == LOCAL),
            patch_log_monitor(needed=shows_logs or target != LOCAL),
            preserve_handlers(),
        ):
            _initialize_ray(
                address=target,
                include_dashboard=False if address is None else None,
                logging_level=logging.WARNING,
                log_to_driver=shows_logs,
                runtime_env={"env_vars": {**variables, **(environment or {})}},
                **options,
            )
    except (ConnectionError, RayError, ValueError) as error:
        raise JobError(f"no Ray cluster at {target}: {str(error).splitlines()[0]}") from error
    return True


def get_address(address: str | None) -> str:
    """Return the address that `connect_to_ray` uses; LOCAL if it starts a node.

    Args:
        address: address of a cluster, or None for the default.
    """
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def check_resources(what: str, cpus: float, gpus: float) -> None:
    """Raise UsageError if Ray runs on this machine alone and lacks the requested resources.

    Ray would wait for the missing resources without a message, on a single machine forever.

    Args:
        what: name of the work, the subject of the error message.
        cpus: number of CPU cores.
        gpus: number of GPUs.
    """
    is_local = ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback
    if is_local and (missing := find_missing_resources(cpus, gpus)):
        raise UsageError(f"{what} takes {missing}: request less, or name a cluster with --address")


def find_missing_resources(cpus: float, gpus: float) -> str | None:
    """Describe the first resource of which the cluster has too little at present.

    Args:
        cpus: number of CPU cores.
        gpus: number of GPUs.

    Returns:
        Text such as "4 GPUs, and Ray has 1", or None if the cluster has enough.
    """
    available = ray.cluster_resources()
    for kind, requested in (("CPU", cpus), ("GPU", gpus)):
        if requested > available.get(kind, 0):
            return f"{requested:g} {kind}s, and Ray has {available.get(kind, 0):g}"
    return None


def get_max_node_cores() -> float:
    """Return the CPU cores of the largest node, for work that runs alone; at least 1, as a head node may have none."""
    return max([1.0, *(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])])


def _initialize_ray(**options: Any) -> None:
    """Call `ray.init`, and repeat it if the node does not start within Ray's 30 s, as on a busy machine."""
    for is_last in (False, True):
        try:
            ray.init(**options)
        except Exception as error:
            # Ray raises a bare Exception if a node does not start in time.
            if type(error) is not Exception:
                raise
            if is_last:
                reason = str(error).splitlines()[0]
                raise JobError(
                    f"Ray did not start on this machine: {reason} Two attempts failed. Try again when the machine is less busy"
                ) from error
        else:
            return


def _check_temporary_folder() -> None:
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder, limit = os.environ.get(name, "/tmp"), MAX_SOCKET_PATH - len(RAY_SOCKET)
    if len(folder.encode()) > limit:
        raise UsageError(
            f"Ray cannot start: {name} has {len(folder.encode())} characters, and its sockets leave room for {limit}. Set "
            f"{name} to a shorter folder, such as /tmp"
        )

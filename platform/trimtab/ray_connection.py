"""The Ray that jobs and servers run on: a cluster that is joined, or one started on this machine; and whether it has what
they take."""

import ipaddress
import logging
import os
from collections.abc import Mapping

import ray
from ray.exceptions import RayError

from trimtab import settings
from trimtab.errors import JobError, UsageError
from trimtab.ray_patches import patch_node_address

LOCAL = "local"
# Nobody takes this machine away from a job: Ray Train need not start a process that watches for it.
ON_ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def connect_to_ray(address: str | None, environment: Mapping[str, str] | None = None) -> bool:
    """Be connected to the cluster at `address`, else at RAY_ADDRESS, else to one started here; what runs there for us gets
    `environment` too. True where this connected, so that `ray.shutdown` is the caller's. Raises JobError.
    """
    if ray.is_initialized():
        return False
    passed, where = settings.prepare_environment(), get_address(address)
    passed |= ON_ONE_MACHINE if where == LOCAL else {}
    # It tells at each start that token authentication is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        with patch_node_address(loopback=where == LOCAL):
            ray.init(
                address=where,
                include_dashboard=False if address is None else None,
                logging_level=logging.WARNING,
                log_to_driver=bool(os.environ.get("TRIMTAB_VERBOSE")),
                runtime_env={"env_vars": {**passed, **(environment or {})}},
            )
    except (ConnectionError, RayError, ValueError) as error:
        raise JobError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        # A node that is not up in time has no kind of error of its own.
        if type(error) is not Exception:
            raise
        raise JobError(
            f"Ray did not start here, try again when this machine does less: {str(error).splitlines()[0]}"
        ) from error
    return True


def get_address(address: str | None) -> str:
    """Where `connect` looks for a cluster; LOCAL where it starts one."""
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def check_resources(what: str, cpus: float, gpus: float) -> None:
    """Raise UsageError where Ray is on this machine alone, and has less than `what` takes: it waits for more without a word,
    and here for ever."""
    alone = ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback
    if alone and (short := find_missing_resources(cpus, gpus)):
        raise UsageError(f"{what} takes {short}: ask for less, or give a cluster with --address")


def find_missing_resources(cpus: float, gpus: float) -> str | None:
    """What the cluster has too little of at present, in words."""
    has = ray.cluster_resources()
    for kind, asked in (("CPU", cpus), ("GPU", gpus)):
        if asked > has.get(kind, 0):
            return f"{asked:g} {kind}s, and Ray has {has.get(kind, 0):g}"
    return None


def get_max_node_cores() -> float:
    """CPU cores of the largest node, for work that runs alone; 1 where a head without any is all that is up."""
    return max([1.0, *(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])])

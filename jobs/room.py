"""Whether Ray has what a job asks for. It waits for more without a word, and on one machine for ever."""

import ipaddress

import ray

from trimtab.errors import UsageError


def check(what: str, cpus: float, gpus: float) -> None:
    """Raise UsageError where Ray is on this machine alone, and has less than `what` takes."""
    alone = ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback
    if alone and (short := lacking(cpus, gpus)):
        raise UsageError(f"{what} takes {short}: ask for less, or give a cluster with --address")


def lacking(cpus: float, gpus: float) -> str | None:
    """What the cluster has too little of at present, in words."""
    has = ray.cluster_resources()
    for kind, asked in (("CPU", cpus), ("GPU", gpus)):
        if asked > has.get(kind, 0):
            return f"{asked:g} {kind}s, and Ray has {has.get(kind, 0):g}"
    return None

"""Settings of `trimtab submit` and `trimtab jobs`."""

import re
from dataclasses import dataclass, field

from trimtab.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Send a command of trimtab to a Ray cluster: trimtab submit --name NAME -- COMMAND [options].

    Args:
        command: the command as it would be run here, without `trimtab`; after `--`.
        name: what the job is called; a name is used once on a cluster.
        address: the cluster's dashboard, as http://localhost:8265; without it, RAY_API_SERVER_ADDRESS.
        attach: where there is a job of this name already, follow it instead of being refused.
        wait: follow its log until it ends; the exit code is the job's then.
        upload: folder that is sent along and that the job runs in; what its .gitignore names stays here.
        packages: file of pinned packages to install on the nodes, as locks/gpu.txt; without it, what they have.
        image: container image to run in.
        cpus: CPU cores for the command itself; what it starts asks for its own.
        gpus: GPUs for the command itself.
        retries: how often the command is run again where it fails; wrong usage is not tried again.
        environment: names of variables whose values here the job gets: secrets, addresses of stores.
    """

    command: list[str] = field(default_factory=list[str])
    name: str
    address: str | None = None
    attach: bool = False
    wait: bool = False
    upload: str | None = None
    packages: str | None = None
    image: str | None = None
    cpus: float = 0
    gpus: float = 0
    retries: int = 0
    environment: list[str] | str = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} is no name for a job: letters, digits, and . _ - within")
        if not self.command:
            raise UsageError(
                f"submit: nothing to do; say it after --, as: trimtab submit --name {self.name} -- align --name mine"
            )
        if min(self.cpus, self.gpus, self.retries) < 0:
            raise UsageError("submit: cpus, gpus and retries must not be below 0")


@dataclass(frozen=True)
class JobsConfig:
    """List the jobs of a cluster.

    Args:
        address: the cluster's dashboard, as http://localhost:8265; without it, RAY_API_SERVER_ADDRESS.
    """

    address: str | None = None


@dataclass(frozen=True)
class JobConfig:
    """One job of a cluster.

    Args:
        name: what it was called when it was submitted.
        address: the cluster's dashboard, as http://localhost:8265; without it, RAY_API_SERVER_ADDRESS.
        follow: go on until it ends, and end with its exit code.
    """

    name: str
    address: str | None = field(default=None, kw_only=True)
    follow: bool = field(default=False, kw_only=True)

"""Settings of `trimtab submit` and `trimtab jobs`."""

import re
from dataclasses import dataclass, field

from trimtab.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Submit a trimtab command to a Ray cluster.

    Usage: trimtab submit --name NAME -- COMMAND [options].

    Args:
        command: command to run and its options, without `trimtab`; given after `--`.
        name: name of the job; unique on the cluster.
        address: URL of the cluster's dashboard, such as http://localhost:8265; by default RAY_API_SERVER_ADDRESS.
        attach: follow the existing job if the name is taken, instead of an error.
        wait: follow the log until the job ends, and end with its exit code.
        working_dir: folder to upload as the working directory of the job; files that its .gitignore names are left out.
        requirements: requirements file of pinned packages to install on the nodes, such as locks/gpu.txt; by default none.
        image_uri: container image to run in.
        num_cpus: CPU cores for the command itself; its tasks and workers reserve their own.
        num_gpus: GPUs for the command itself.
        max_retries: maximum number of retries after a failure; usage errors and interrupts are not retried.
        stop_wait_seconds: time that `trimtab jobs stop` leaves the command to write a checkpoint before it is killed.
        env_vars: names of local environment variables to pass to the job, such as secrets and store addresses.
    """

    command: list[str] = field(default_factory=list[str])
    name: str
    address: str | None = None
    attach: bool = False
    wait: bool = False
    working_dir: str | None = None
    requirements: str | None = None
    image_uri: str | None = None
    num_cpus: float = 0
    num_gpus: float = 0
    max_retries: int = 0
    stop_wait_seconds: int = 60
    env_vars: list[str] | str = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} is not a valid job name: use letters, digits, and . _ - after the first character")
        if not self.command:
            raise UsageError(
                f"submit: no command given. Add it after --: trimtab submit --name {self.name} -- align --name mine"
            )
        if min(self.num_cpus, self.num_gpus, self.max_retries, self.stop_wait_seconds) < 0:
            raise UsageError("submit: num_cpus, num_gpus, max_retries and stop_wait_seconds must be at least 0")


@dataclass(frozen=True)
class JobsConfig:
    """List the jobs of a cluster.

    Args:
        address: URL of the cluster's dashboard, such as http://localhost:8265; by default RAY_API_SERVER_ADDRESS.
    """

    address: str | None = None


@dataclass(frozen=True)
class StopConfig:
    """Stop a job.

    Args:
        name: name of the job.
        address: URL of the cluster's dashboard, such as http://localhost:8265; by default RAY_API_SERVER_ADDRESS.
    """

    name: str
    address: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LogsConfig(StopConfig):
    """Print the log of a job.

    Args:
        follow: follow the log until the job ends, and end with its exit code.
    """

    follow: bool = field(default=False, kw_only=True)

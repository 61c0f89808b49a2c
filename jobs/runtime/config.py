"""Settings of the align job. Each field is at once an option of the command line, a key of the YAML and a line of the help."""

from dataclasses import dataclass
from typing import Literal

from trimtab.errors import UsageError


def as_source_list(given: list[str] | str) -> list[str]:
    """One source or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


@dataclass(frozen=True)
class ScaleConfig:
    """What the job takes of the cluster.

    Args:
        workers: training workers; the prefix is the same for any number.
        least_workers: where above 0, training goes on with as few where nodes leave, and with more again where they come
            back; else it waits until there are `workers`.
        parallel: data gives each worker the whole model; shard cuts the layers' weights over the workers (FSDP2), for models
            that are too large for one device.
        cpus: CPU cores for each worker; 0 shares this machine's cores out.
        gpus: GPUs for each worker, and for each engine.
        engines: engines that sample targets at the same time.
        retries: times that training may lose workers and go on from its last checkpoint.
        storage: folder for checkpoints that all nodes reach, as s3://bucket/folder or a path; without it, the run's own folder
            in trimtab's home.
        address: Ray cluster to run on; without one a local Ray is started for the job.
    """

    workers: int = 1
    least_workers: int = 0
    parallel: Literal["data", "shard"] = "data"
    cpus: float = 0
    gpus: float = 0
    engines: int = 1
    retries: int = 3
    storage: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise UsageError(f"scale.retries must not be below 0, not {self.retries}")

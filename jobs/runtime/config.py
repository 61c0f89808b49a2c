"""Settings shared by jobs: cluster resources and lists of sources."""

from dataclasses import dataclass
from typing import Literal

from trimtab.errors import UsageError


def as_source_list(sources: list[str] | str) -> list[str]:
    """Return one or several sources as a list."""
    return [sources] if isinstance(sources, str) else list(sources)


@dataclass(frozen=True)
class ScaleConfig:
    """Cluster resources of the job.

    Args:
        workers: number of training workers; the prefix is the same for any number.
        least_workers: minimum number of training workers (elastic training); above 0, training continues with as few as
            this when nodes leave and uses more when nodes return; 0 waits for all workers.
        parallel: data loads the full model on each worker; shard splits the weights of the layers over the workers (FSDP2),
            for models that are too large for one device.
        cpus: CPU cores per worker; 0 divides the available cores evenly.
        gpus: GPUs per worker and per engine.
        engines: number of engines that generate in parallel.
        retries: maximum number of restarts from the last checkpoint after a loss of workers.
        storage: checkpoint folder that all nodes can access, as s3://bucket/folder or a path; without it, the folder of the
            run in trimtab's home.
        address: address of the Ray cluster; without it, a local Ray is started for the job.
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

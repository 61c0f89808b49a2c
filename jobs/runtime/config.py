"""Settings shared by jobs: cluster resources and lists of sources."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from trimtab.errors import UsageError


def as_source_list(sources: list[str] | str) -> list[str]:
    """Return one or several sources as a list."""
    return [sources] if isinstance(sources, str) else list(sources)


def check_ranges(section: str, config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise UsageError if a setting is out of its range.

    Args:
        section: name of the settings, for the message.
        config: dataclass or mapping with the settings.
        ranges: lowest and highest value by name; infinity for no limit.
    """
    values = config if isinstance(config, Mapping) else vars(config)
    for name, (low, high) in ranges.items():
        # Negated, so that NaN is rejected as well.
        if not low <= values[name] <= high or values[name] == inf:
            limits = f"at least {low:g}" if high == inf else f"from {low:g} to {high:g}"
            raise UsageError(f"{section}.{name} must be {limits}, not {values[name]}")


@dataclass(frozen=True)
class ScaleConfig:
    """Cluster resources of the job.

    Args:
        num_workers: number of training workers; the prefix is the same for any number.
        min_workers: minimum number of training workers (elastic training); above 0, training continues with as few as
            this when nodes leave and uses more when nodes return; 0 waits for all workers.
        parallelism: data loads the full model on each worker; fsdp splits the weights of the layers over the workers (FSDP2),
            for models that are too large for one device.
        cpus_per_worker: CPU cores per worker; 0 divides the available cores evenly.
        gpus_per_worker: GPUs per worker and per engine.
        num_engines: number of engines that generate in parallel.
        max_failures: maximum number of restarts from the last checkpoint after a loss of workers.
        storage_path: checkpoint folder that all nodes can access, as s3://bucket/folder or a path; without it, the folder of
            the run in trimtab's home.
        address: address of the Ray cluster; without it, a local Ray is started for the job.
    """

    num_workers: int = 1
    min_workers: int = 0
    parallelism: Literal["data", "fsdp"] = "data"
    cpus_per_worker: float = 0
    gpus_per_worker: float = 0
    num_engines: int = 1
    max_failures: int = 3
    storage_path: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise UsageError(f"scale.max_failures must not be below 0, not {self.max_failures}")

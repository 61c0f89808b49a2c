"""Heads fitted side by side: each candidate with each seed is a task of one CPU core, wherever the cluster has one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from trimtab.detection import training
from trimtab.detection.training import Candidate, Learned, Parts
from trimtab.jobs.cluster import POLL_SECONDS, cause


@dataclass(frozen=True)
class Fit:
    """A candidate with a seed, and the rows of that seed."""

    candidate: Candidate
    seed: int
    rows: Parts


def run(wanted: Sequence[Fit], tick: Callable[[], None]) -> list[Learned]:
    """What each fit makes, in the order of `wanted`; `tick` is called as each ends. To be called on a joined cluster.

    Raises what the first fit that failed raised; the others are cancelled then.
    """
    rows = {id(fit.rows): fit.rows for fit in wanted}
    kept = {key: ray.put(parts) for key, parts in rows.items()}
    task = ray.remote(num_cpus=1)(training.learn)
    references = [task.remote(fit.candidate, kept[id(fit.rows)], fit.seed) for fit in wanted]
    waiting = references
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for reference in ended:
                ray.get(reference)
                tick()
        return ray.get(references)
    except RayError as error:
        raise cause(error) from error
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)

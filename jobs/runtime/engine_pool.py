"""A pool of engines on the cluster that answers any number of requests: Ray Data over actors that each hold the model."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, TypeVar
from warnings import catch_warnings, simplefilter

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from trimtab.artifacts.prefix import Prefix
from trimtab.cli.console import ProgressBar, print_line
from trimtab.engine.config import EngineConfig
from trimtab.errors import TrimtabError
from trimtab.generation_types import Answer, Ask, Sampling
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import Message
from trimtab.ray_connection import check_resources, find_missing_resources, get_max_node_cores
from trimtab.types import Precision


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation to answer, and how; or to read, where its answer is `given`."""

    messages: Sequence[Message]
    sampling: Sampling
    given: str | None = None

    def key(self, precision: Precision) -> str:
        """24 hex digits that name the request, for answers of one base model computed in one precision."""
        what = json.dumps([list(self.messages), asdict(self.sampling), precision, self.given])
        return hashlib.sha256(what.encode()).hexdigest()[:24]


# Requests that an engine is given at once: a few rounds of what it runs at the same time, so that little idles at the end.
BATCH = 128

T = TypeVar("T")
AskEngine = Callable[[Sequence[GenerationRequest]], list[list[Answer]]]
"""Asks an engine: the answers of each request."""
EngineWork = Callable[[AskEngine, Sequence[GenerationRequest]], Sequence[T]]
"""What is done beside an engine with a batch of requests, asking it once or more: one thing for each request."""


def generate_batches(
    title: str,
    base: BaseModel,
    requests: Mapping[str, GenerationRequest],
    engine: EngineConfig,
    scale: ScaleConfig,
    prefix: Prefix | None = None,
) -> Iterator[dict[str, list[Answer]]]:
    """Answers by the requests' keys; see `worked`. Either all requests bring their answers or none does."""
    return run_pool(title, base, requests, engine, scale, prefix, return_answers)


def return_answers(ask: AskEngine, requests: Sequence[GenerationRequest]) -> list[list[Answer]]:
    """The least work: their answers."""
    return ask(requests)


def run_pool(
    title: str,
    base: BaseModel,
    requests: Mapping[str, GenerationRequest],
    engine: EngineConfig,
    scale: ScaleConfig,
    prefix: Prefix | None,
    work: EngineWork[T],
    batch: int = BATCH,
) -> Iterator[dict[str, T]]:
    """What `work` makes of requests, by their keys, `batch` requests at a time and as they come in, behind a progress bar.

    Raises errors of ours for what an engine refuses, JobError for an engine that is lost.
    """
    cpus = max(1.0, get_max_node_cores() // scale.engines)
    taken = scale.engines * cpus, scale.engines * scale.gpus
    check_resources(f"{title}, by {scale.engines} engines,", *taken)
    if short := find_missing_resources(*taken):
        print_line(f"{title}: waits for nodes: it takes {short}")
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"key": key, "request": request} for key, request in requests.items()]
    with catch_warnings():
        # Ray has no other name yet for how often an actor may restart.
        simplefilter("ignore", RayDeprecationWarning)
        answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch)).map_batches(
            PooledEngine,
            # A block is a batch: of several blocks Ray Data would make one task, and answers would come late.
            batch_size=None,
            fn_constructor_args=(base, engine, prefix, work),
            compute=ActorPoolStrategy(size=scale.engines),
            num_cpus=cpus,
            num_gpus=scale.gpus or None,
            # What was answered is kept, and the same command asks the rest.
            max_restarts=0,
        )
    done = 0
    try:
        with ProgressBar(title, len(rows)) as bar:
            for block in answered.iter_batches(batch_size=None):
                first: Any = block["made"][0]
                if isinstance(first, TrimtabError):
                    raise first
                yield dict(zip(map(str, block["key"]), block["made"], strict=True))
                done += len(block["key"])
                bar.update(done)
    except RayError as error:
        raise unwrap_ray_error(error) from error


class PooledEngine:
    """One engine of the pool. Takes batches with the columns `key` and `request`, and gives `key` and `made`."""

    def __init__(self, base: BaseModel, config: EngineConfig, prefix: Prefix | None, work: EngineWork[Any]) -> None:
        # Not on top: the driver, which only names this class, does without vLLM's half minute.
        offline = import_module("trimtab.engine.offline")
        self.engine = offline.Engine(resolve_on_node(base), config)
        self.prefix = prefix
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What is made of each request; an error of ours in its place, as Ray Data would lose it if it were raised."""
        try:
            made = self.work(self.ask, list(batch["request"]))
        except TrimtabError as error:
            made = [error] * len(batch["key"])
        return {"key": batch["key"], "made": _objects(made)}

    def ask(self, requests: Sequence[GenerationRequest]) -> list[list[Answer]]:
        """The answers of each request; those that are given, read."""
        asks = [Ask(request.messages, self.prefix) for request in requests]
        given = [request.given for request in requests if request.given is not None]
        if given:
            return [[read] for read in self.engine.read_many(asks, given)]
        return self.engine.chat_many(asks, [request.sampling for request in requests])


def _objects(values: Sequence[Any]) -> Any:
    """A column of Python objects, filled one by one, as numpy takes lists of one length apart."""
    column = np.empty(len(values), dtype=object)
    for at, value in enumerate(values):
        column[at] = value
    return column

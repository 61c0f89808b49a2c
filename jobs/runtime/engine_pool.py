"""Pool of engines on the cluster for batch generation: Ray Data over actors that each hold the base model."""

import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
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
from trimtab.generation_types import Answer, Conversation, Sampling
from trimtab.jobs.runtime.cluster import unwrap_ray_error
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.model.base_model import BaseModel, resolve_on_node
from trimtab.model.chat_template import Message
from trimtab.ray_connection import check_resources, find_missing_resources, get_max_node_cores
from trimtab.types import DType
from trimtab.util.identifiers import compute_key


@dataclass(frozen=True)
class GenerationRequest:
    """Request to generate answers, or to read a supplied answer.

    Attributes:
        messages: conversation to answer.
        sampling: sampling settings of the answers.
        supplied_answer: answer to read instead of generating one.
        answer_start: opening that generated answers continue; it is not part of them.
        recorded: whether the signals include those of the unfinished answer and of the windows of the prompt.
    """

    messages: Sequence[Message]
    sampling: Sampling
    supplied_answer: str | None = None
    answer_start: str = ""
    recorded: bool = False

    def key(self, precision: DType) -> str:
        """Return the cache key of the request, 24 hex digits; it is unique per base model.

        Args:
            precision: precision of the base model.
        """
        content = json.dumps([list(self.messages), asdict(self.sampling), precision, self.supplied_answer])
        return compute_key(content + self.answer_start, 24)


# Requests per batch: a few times the number that an engine runs concurrently, so that the end of a batch idles little.
BATCH = 128

T = TypeVar("T")
SendToEngine = Callable[[Sequence[GenerationRequest]], list[list[Answer]]]
"""Function that sends requests to an engine and returns the answers to each."""
EngineWork = Callable[[SendToEngine, Sequence[GenerationRequest]], Sequence[T]]
"""Function that processes a batch of requests with one or more engine calls and returns one result per request."""


def run_pool(
    title: str,
    base: BaseModel,
    requests: Mapping[str, GenerationRequest],
    engine: EngineConfig,
    scale: ScaleConfig,
    prefix: Prefix | None,
    work: EngineWork[T],
    batch: int = BATCH,
) -> Generator[dict[str, T]]:
    """Process requests on a pool of engines and yield the results batch by batch, with a progress bar.

    The caller must close the generator before the connection to Ray is closed; the pool ends with it.

    Args:
        title: title of the progress bar.
        base: base model of the engines.
        requests: requests by key.
        engine: settings of the engines.
        scale: number of engines, and GPUs per engine.
        prefix: prefix for all requests, None for the base model alone.
        work: function that processes a batch on an engine.
        batch: maximum number of requests in a batch.

    Yields:
        Results of a batch by the keys of the requests.

    Raises:
        TrimtabError: if an engine rejects a request.
        UsageError: if a local Ray has too few resources.
        JobError: if an engine is lost.
    """
    cpus = max(1.0, get_max_node_cores() // scale.num_engines)
    required = scale.num_engines * cpus, scale.num_engines * scale.gpus_per_worker
    check_resources(f"{title}, by {scale.num_engines} engines,", *required)
    if missing := find_missing_resources(*required):
        print_line(f"{title}: waits for nodes: needs {missing}")
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"key": key, "request": request} for key, request in requests.items()]
    with catch_warnings():
        # `max_restarts` is deprecated, but Ray Data has no replacement yet.
        simplefilter("ignore", RayDeprecationWarning)
        results = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch)).map_batches(
            PooledEngine,
            # One block per batch: with a batch size, Ray Data merges blocks into one task and results arrive late.
            batch_size=None,
            fn_constructor_args=(base, engine, prefix, work),
            compute=ActorPoolStrategy(size=scale.num_engines),
            num_cpus=cpus,
            num_gpus=scale.gpus_per_worker or None,
            # No restarts: finished batches are stored by the caller, and the same command computes the rest.
            max_restarts=0,
        )
    done = 0
    try:
        with ProgressBar(title, len(rows)) as bar:
            for block in results.iter_batches(batch_size=None):
                first: Any = block["result"][0]
                if isinstance(first, TrimtabError):
                    raise first
                yield dict(zip(map(str, block["key"]), block["result"], strict=True))
                done += len(block["key"])
                bar.update(done)
    except RayError as error:
        raise unwrap_ray_error(error) from error


class PooledEngine:
    """Ray Data actor that holds one engine; it maps the columns `key` and `request` to `key` and `result`.

    Args:
        base: base model to load.
        config: settings of the engine.
        prefix: prefix for all requests, None for the base model alone.
        work: function that processes a batch of requests.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, prefix: Prefix | None, work: EngineWork[Any]) -> None:
        # Imported lazily: the driver imports this module, and the import of vLLM takes half a minute.
        offline = import_module("trimtab.engine.offline")
        self.engine = offline.Engine(resolve_on_node(base), config)
        self.prefix = prefix
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Process a batch; a TrimtabError is returned as the result, because Ray Data would lose its type if raised."""
        try:
            results = self.work(self.send_requests, list(batch["request"]))
        except TrimtabError as error:
            results = [error] * len(batch["key"])
        return {"key": batch["key"], "result": _to_object_column(results)}

    def send_requests(self, requests: Sequence[GenerationRequest]) -> list[list[Answer]]:
        """Return the answers to each request, generated or, if all requests have a supplied answer, read."""
        conversations = [Conversation(request.messages, self.prefix, request.answer_start) for request in requests]
        supplied = [request.supplied_answer for request in requests if request.supplied_answer is not None]
        recorded = any(request.recorded for request in requests)
        if supplied:
            return [[answer] for answer in self.engine.score_many(conversations, supplied, recorded=recorded)]
        return self.engine.chat_many(conversations, [request.sampling for request in requests], recorded=recorded)


def _to_object_column(values: Sequence[Any]) -> Any:
    """Return a numpy array of objects; filled by item, because numpy turns lists of equal length into a 2-D array."""
    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column

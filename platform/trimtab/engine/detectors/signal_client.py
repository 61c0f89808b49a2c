"""Batched client for the signals that the engine's workers capture."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.generation_types import Signals


@dataclass(frozen=True)
class SignalRequest:
    """Pending query of one request's signals.

    Attributes:
        request: engine id of the request.
        tokens: number of answer tokens to include.
        ended: whether the answer is complete, so that the worker can discard the signals.
        future: receives the signals; None if the engine has none.
    """

    request: str
    tokens: int
    ended: bool
    future: asyncio.Future[Signals | None]


class SignalClient:
    """Client for signals of running and ended requests. Not thread-safe: use it from one event loop.

    A call waits until the engine's step ends. Queries that arrive meanwhile are batched into the next call.

    Args:
        call: the engine's `collective_rpc`.
        layers: number of captured layers.
    """

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], layers: int) -> None:
        self._call = call
        self._layers = layers
        self._queue: list[SignalRequest] = []
        self._task: asyncio.Task[None] | None = None

    async def fetch_signals(self, request: str, tokens: int, *, ended: bool) -> Signals | None:
        """Fetch the signals of one request.

        Args:
            request: engine id of the request.
            tokens: number of answer tokens to include; with 0, only the signals and risks of the prompt are fetched.
            ended: whether the answer is complete, so that the worker can discard the signals.

        Returns:
            The signals; None if the engine has none.

        Raises:
            Exception: any error of the engine's `collective_rpc`.
        """
        future: asyncio.Future[Signals | None] = asyncio.get_running_loop().create_future()
        self._queue.append(SignalRequest(request, tokens, ended, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fetch_pending())
        return await future

    async def _fetch_pending(self) -> None:
        while self._queue:
            queries, self._queue = self._queue, []
            try:
                replies = await self._call("trimtab_fetch_signals", args=([(q.request, q.tokens, q.ended) for q in queries],))
                results = decode_signals(replies, self._layers)
            except Exception as error:
                for query in queries:
                    if not query.future.done():
                        query.future.set_exception(error)
                continue
            for query, signals in zip(queries, results, strict=True):
                # The future is done already if its caller was cancelled.
                if not query.future.done():
                    query.future.set_result(signals)


def decode_signals(replies: Sequence[Any], layers: int) -> list[Signals | None]:
    """Decode the workers' replies to `trimtab_fetch_signals`.

    Args:
        replies: one reply per worker; only rank 0 replies with records, the others with None.
        layers: number of captured layers.

    Returns:
        Signals of each queried request; None if the engine has none.
    """
    records = next(reply for reply in replies if reply is not None)
    return [None if record is None else _decode_record(record, layers) for record in records]


def _decode_record(record: dict[str, Any], layers: int) -> Signals:
    psi = _decode_floats(record, "psi", torch.float32)
    history = _decode_floats(record, "history", torch.float32).view(-1, 3)
    prompt = _decode_floats(record, "prompt", torch.float32)
    # With neither, all tensors are empty, and their width does not matter.
    width = max(len(psi), len(prompt)) // (3 * layers) or 1
    windows = _decode_floats(record, "windows", torch.float32).view(-1, layers, width)
    running = _decode_floats(record, "running", torch.float16).view(-1, layers, 3 * width)
    states = (values.view(layers, -1) if len(values) else values.view(layers, 0) for values in (psi, prompt))
    answer_psi, prompt_psi = states
    return Signals(answer_psi, history, tuple(record["prompt_risks"]), windows, running, prompt_psi)


def _decode_floats(record: dict[str, Any], name: str, dtype: torch.dtype) -> torch.Tensor:
    # `frombuffer` rejects empty buffers: an engine without token statistics has no history.
    data = record.get(name)
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

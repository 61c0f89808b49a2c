"""Signals fetched from the engine's workers, of many requests in one call."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.generation_types import Signals


@dataclass(frozen=True)
class SignalRequest:
    """Signals of a request in the engine at its first `tokens` tokens, and who waits for them; `ended` lets the engine forget
    the request."""

    request: str
    tokens: int
    ended: bool
    future: asyncio.Future[Signals | None]


class SignalClient:
    """Reads signals of requests that run or have ended, from the one event loop that it is used in.

    A call waits until the engine's step is over, so all that is asked meanwhile goes into the next call together. `call` is
    the engine's `collective_rpc`; so many `layers` are captured.
    """

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], layers: int) -> None:
        self._call = call
        self._layers = layers
        self._wanted: list[SignalRequest] = []
        self._reading: asyncio.Task[None] | None = None

    async def fetch_signals(self, request: str, tokens: int, *, ended: bool) -> Signals | None:
        """Signals of a request by its id in the engine; None where the engine has none. Raises what the engine raises."""
        future: asyncio.Future[Signals | None] = asyncio.get_running_loop().create_future()
        self._wanted.append(SignalRequest(request, tokens, ended, future))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._fetch_pending())
        return await future

    async def _fetch_pending(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, []
            try:
                answer = await self._call("trimtab_fetch_signals", args=([(w.request, w.tokens, w.ended) for w in wanted],))
                found = decode_signals(answer, self._layers)
            except Exception as error:
                for one in wanted:
                    if not one.future.done():
                        one.future.set_exception(error)
                continue
            for one, signals in zip(wanted, found, strict=True):
                # Whoever waited may have gone.
                if not one.future.done():
                    one.future.set_result(signals)


def decode_signals(answer: Sequence[Any], layers: int) -> list[Signals | None]:
    """What the workers answered to `trimtab_fetch_signals`: one of them for all."""
    records = next(found for found in answer if found is not None)
    return [None if record is None else _decode_record(record, layers) for record in records]


def _decode_record(record: dict[str, Any], layers: int) -> Signals:
    psi = torch.frombuffer(bytearray(record["psi"]), dtype=torch.float32).view(layers, -1)
    return Signals(psi, torch.frombuffer(bytearray(record["history"]), dtype=torch.float32).view(-1, 3))

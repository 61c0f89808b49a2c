"""Context of one HTTP request that vLLM's app has no argument for: it crosses the app in context variables."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from trimtab.types import Position


@dataclass(frozen=True)
class Steering:
    """Prefix of one request as it is in the engine: its slots and the salt of its KV cache.

    `written` is set while the vectors are still being sent to the slots; it is done when they have arrived. `digest` is that of
    the vectors.
    """

    name: str
    version: int
    run_id: str | None
    position: Position
    slots: tuple[int, ...]
    salt: str
    written: asyncio.Future[None] | None = None
    digest: str | None = None


steering: ContextVar[Steering | None] = ContextVar("steering", default=None)
"""Prefix of the HTTP request that this task answers."""

reads_supplied_answer: ContextVar[bool] = ContextVar("reads_supplied_answer", default=False)
"""Whether this task scores an answer that the client supplied: only then may a prompt hold one."""

validated_grammar: ContextVar[Any] = ContextVar("validated_grammar", default=None)
"""Structured outputs of this task's request that were validated outside of the event loop."""

tenant: ContextVar[str | None] = ContextVar("tenant", default=None)
"""Salt of the KV cache of the API key that sent the request; None if all requests share the cache."""


def join_salts(client_salt: str | None = None) -> str | None:
    """Return the salt of the KV cache of this task's request, None for a cache that all requests share.

    The salts of prefix and tenant come first and have fixed lengths, so that no salt of a client equals that of another tenant.

    Args:
        client_salt: salt that the client sent.
    """
    prefix = steering.get()
    return ":".join(filter(None, (prefix and prefix.salt, tenant.get(), client_salt))) or None

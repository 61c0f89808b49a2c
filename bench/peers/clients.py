"""Clients that ask a server on and on, and what they saw."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

OK, PAUSE_SECONDS, PATIENCE_SECONDS = 200, 0.2, 60


@dataclass
class Clients:
    """So many clients, each with a question of its own, in a thread: when answers came and their status (0 where none came),
    and how many were not the `right` one."""

    url: str
    model: str
    right: Mapping[str, str]
    tokens: int
    seen: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    wrong: list[str] = field(default_factory=list[str])
    ended: bool = False

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the last answers."""
        self.ended = True
        self._thread.join()

    def calm(self, seconds: float) -> bool:
        """Whether every client was answered of late, and none was not."""
        late = [status for at, status in list(self.seen) if at > time.monotonic() - seconds]
        return len(late) >= len(self.right) and set(late) == {OK}

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(PATIENCE_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, text) for text in self.right))

    async def _client(self, session: aiohttp.ClientSession, text: str) -> None:
        while not self.ended:
            status, said = await ask(session, self.url, self.model, text, self.tokens)
            self.seen.append((time.monotonic(), status))
            if status != OK:
                await asyncio.sleep(PAUSE_SECONDS)
            elif said != self.right[text]:
                self.wrong.append(said)


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str, tokens: int) -> tuple[int, str]:
    """Status and text of one greedy answer; 0 where the connection broke or nothing came in time."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            said = await reply.json(content_type=None)
            return reply.status, said["choices"][0]["message"]["content"] if reply.status == OK else ""
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return 0, ""


def answers(url: str, model: str, texts: Sequence[str], tokens: int) -> dict[str, str]:
    """What a calm server says to each."""

    async def all_of_them() -> list[tuple[int, str]]:
        async with aiohttp.ClientSession() as session:
            return [await ask(session, url, model, text, tokens) for text in texts]

    found = asyncio.run(all_of_them())
    if any(status != OK for status, _ in found):
        raise RuntimeError(f"a calm server answered {found}")
    return {text: said for text, (_, said) in zip(texts, found, strict=True)}

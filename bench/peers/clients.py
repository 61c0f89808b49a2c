"""Clients that send requests to a server continuously and record the results."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

OK, PAUSE_SECONDS, TIMEOUT_SECONDS = 200, 0.2, 60


@dataclass
class Clients:
    """Clients in a background thread, one for each question.

    Attributes:
        url: URL of the server.
        model: name of the model.
        expected: expected answer to each question.
        tokens: maximum number of tokens of an answer.
        outcomes: time and status of each request; status 0 without a response.
        wrong_answers: answers that differ from the expected ones.
        stopped: whether the clients send no further requests.
    """

    url: str
    model: str
    expected: Mapping[str, str]
    tokens: int
    outcomes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    wrong_answers: list[str] = field(default_factory=list[str])
    stopped: bool = False

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Start to send requests."""
        self._thread.start()

    def stop(self) -> None:
        """Send no further requests, and wait for the last responses."""
        self.stopped = True
        self._thread.join()

    def is_stable(self, seconds: float) -> bool:
        """Return whether the last seconds have at least as many requests as there are clients, and all succeeded."""
        statuses = [status for at, status in list(self.outcomes) if at > time.monotonic() - seconds]
        return len(statuses) >= len(self.expected) and set(statuses) == {OK}

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._run_client(session, text) for text in self.expected))

    async def _run_client(self, session: aiohttp.ClientSession, text: str) -> None:
        while not self.stopped:
            status, answer = await send_question(session, self.url, self.model, text, self.tokens)
            self.outcomes.append((time.monotonic(), status))
            if status != OK:
                await asyncio.sleep(PAUSE_SECONDS)
            elif answer != self.expected[text]:
                self.wrong_answers.append(answer)


async def send_question(session: aiohttp.ClientSession, url: str, model: str, text: str, tokens: int) -> tuple[int, str]:
    """Send a chat request with greedy decoding.

    Returns:
        Status and text of the answer; status 0 if the connection fails, the response is invalid, or the request times out.
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.json(content_type=None)
            return response.status, answer["choices"][0]["message"]["content"] if response.status == OK else ""
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return 0, ""


def collect_answers(url: str, model: str, texts: Sequence[str], tokens: int) -> dict[str, str]:
    """Return the answer of an idle server to each text; raise RuntimeError if a request fails."""

    async def send_requests() -> list[tuple[int, str]]:
        async with aiohttp.ClientSession() as session:
            return [await send_question(session, url, model, text, tokens) for text in texts]

    results = asyncio.run(send_requests())
    if any(status != OK for status, _ in results):
        raise RuntimeError(f"requests to an idle server failed: {results}")
    return {text: answer for text, (_, answer) in zip(texts, results, strict=True)}

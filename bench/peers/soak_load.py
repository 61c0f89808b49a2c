"""Mixed load of the soak test: endpoints, artifacts, disconnects, promotions and keys, with checks of every response."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TOKENS = 8
KEY_SECONDS = 3.0


@dataclass(frozen=True)
class Scenario:
    """What the clients request.

    Attributes:
        url: address of the server.
        key: API key of the clients.
        base: name of the base model.
        moved: name of the prefix whose champion changes.
        others: names of further prefixes.
        questions: questions of the clients.
        expected: answer by model name with version and question.
    """

    url: str
    key: str
    base: str
    moved: str
    others: Sequence[str]
    questions: Sequence[str]
    expected: dict[tuple[str, str], str]


@dataclass
class Outcome:
    """Counts of a soak: requests by kind and status, and what must not happen."""

    statuses: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])

    @property
    def requests(self) -> int:
        return self.statuses.total()


class SoakLoad:
    """Clients that send requests until `stopped` is set."""

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        self.scenario = scenario
        self.outcome = Outcome()
        self.stopped = asyncio.Event()
        self._random = random.Random(seed)
        self._kinds: Sequence[tuple[int, Callable[[httpx.AsyncClient], Awaitable[None]]]] = (
            (6, self._send_chat),
            (3, self._send_stream),
            (2, self._send_response),
            (2, self._send_message),
            (2, self._leave_stream),
            (1, self._send_completion),
            (1, self._send_score),
            (1, self._read_lists),
        )

    async def run_client(self) -> None:
        """Send requests of random kinds, one after the other."""
        limits, headers = httpx.Limits(max_connections=2), {"authorization": f"Bearer {self.scenario.key}"}
        async with httpx.AsyncClient(base_url=self.scenario.url, timeout=120, limits=limits, headers=headers) as client:
            weights = [weight for weight, _ in self._kinds]
            while not self.stopped.is_set():
                _, send = self._random.choices(self._kinds, weights)[0]
                try:
                    await send(client)
                except httpx.HTTPError as error:
                    self.outcome.failed.append(f"{send.__name__}: {type(error).__name__} {error}"[:200])

    async def change_keys(self, add: Callable[[str], str], remove: Callable[[str], None], every: float) -> None:
        """Add a key, use it, remove it, and see that it is rejected, until the load is stopped."""
        number = 0
        async with httpx.AsyncClient(base_url=self.scenario.url, timeout=30) as client:
            while not self.stopped.is_set():
                number += 1
                token = await asyncio.to_thread(add, f"guest{number}")
                for name, expected, change in (("added key", 200, None), ("removed key", 401, remove)):
                    if change is not None:
                        await asyncio.to_thread(change, f"guest{number}")
                    await asyncio.sleep(KEY_SECONDS)
                    status = (await client.get("/v1/models", headers={"x-api-key": token})).status_code
                    self.outcome.statuses[f"{name} {status}"] += 1
                    if status != expected:
                        self.outcome.failed.append(f"{name}: status {status}")
                await self._wait(every)

    async def promote(self, change: Callable[[int], None], every: float) -> None:
        """Promote the two versions in turns, until the load is stopped."""
        version = 1
        while not self.stopped.is_set():
            await self._wait(every)
            version = 3 - version
            await asyncio.to_thread(change, version)
            self.outcome.statuses["promotion"] += 1

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except TimeoutError:
            return

    def _build_chat(self, **options: Any) -> dict[str, Any]:
        scenario = self.scenario
        names = [scenario.base, f"{scenario.base}:{scenario.moved}", *(f"{scenario.base}:{name}" for name in scenario.others)]
        messages = [{"role": "user", "content": self._random.choice(scenario.questions)}]
        # Half of the requests are for the prefix that moves.
        model = self._random.choice([names[1], self._random.choice(names)])
        return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0} | options

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        response = await client.post(path, json=body)
        return self._read(path, response.status_code, response)

    def _read(self, path: str, status: int, response: httpx.Response) -> dict[str, Any] | None:
        self.outcome.statuses[f"{path} {status}"] += 1
        if status != httpx.codes.OK:
            self.outcome.failed.append(f"{path}: status {status} {response.text[:200]}")
            return None
        return response.json()

    def _check(self, model: str, question: str, text: str) -> None:
        expected = self.scenario.expected.get((model, question))
        if expected is not None and text != expected:
            self.outcome.wrong.append(f"{model}, {question!r}: {text!r}, not {expected!r}")

    async def _send_chat(self, client: httpx.AsyncClient) -> None:
        body = self._build_chat()
        if answer := await self._post(client, "/v1/chat/completions", body):
            self._check(answer["model"], body["messages"][0]["content"], answer["choices"][0]["message"]["content"])

    async def _send_stream(self, client: httpx.AsyncClient) -> None:
        await self._post_stream(client, self._build_chat(stream=True), chunks=None)

    async def _leave_stream(self, client: httpx.AsyncClient) -> None:
        await self._post_stream(client, self._build_chat(stream=True, max_tokens=64), chunks=2)

    async def _post_stream(self, client: httpx.AsyncClient, body: dict[str, Any], chunks: int | None) -> None:
        chunk_count = 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            self.outcome.statuses[f"stream{'' if chunks is None else ' left'} {response.status_code}"] += 1
            async for line in response.aiter_lines():
                chunk_count += line.startswith("data: {")
                if chunks is not None and chunk_count >= chunks:
                    return
        if response.status_code != httpx.codes.OK or not chunk_count:
            self.outcome.failed.append(f"stream: status {response.status_code} and {chunk_count} chunks")

    async def _send_response(self, client: httpx.AsyncClient) -> None:
        chat = self._build_chat()
        question = chat["messages"][0]["content"]
        body = {"model": chat["model"], "input": question, "max_output_tokens": TOKENS, "temperature": 0}
        if answer := await self._post(client, "/v1/responses", body):
            text = "".join(part["text"] for item in answer["output"] for part in item.get("content") or [])
            self._check(answer["model"], question, text)

    async def _send_message(self, client: httpx.AsyncClient) -> None:
        body = self._build_chat()
        if answer := await self._post(client, "/v1/messages", body):
            self._check(answer["model"], body["messages"][0]["content"], answer["content"][0]["text"])

    async def _send_completion(self, client: httpx.AsyncClient) -> None:
        body = {"model": self.scenario.base, "prompt": self._random.choice(self.scenario.questions), "max_tokens": TOKENS}
        await self._post(client, "/v1/completions", body)

    async def _send_score(self, client: httpx.AsyncClient) -> None:
        chat = self._build_chat()
        await self._post(client, "/v1/score", {"model": chat["model"], "messages": chat["messages"], "answer": "Yes."})

    async def _read_lists(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/v1/models")
        self._read("/v1/models", response.status_code, response)


async def compute_expected(scenario: Scenario, models: Sequence[str]) -> None:
    """Fill `scenario.expected` with the greedy answers of the idle server, by model and question."""
    headers = {"authorization": f"Bearer {scenario.key}"}
    async with httpx.AsyncClient(base_url=scenario.url, timeout=120, headers=headers) as client:
        for model in models:
            for question in scenario.questions:
                body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS}
                response = await client.post("/v1/chat/completions", json=body | {"temperature": 0})
                answer = response.raise_for_status().json()
                scenario.expected[answer["model"], question] = answer["choices"][0]["message"]["content"]


async def count_series(scenario: Scenario) -> int:
    """Return the number of metric series of the server."""
    async with httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {scenario.key}"}) as client:
        text = (await client.get(f"{scenario.url}/metrics")).raise_for_status().text
    return sum(bool(line) and not line.startswith("#") for line in text.splitlines())

"""Load of streaming chat requests on an OpenAI endpoint, in a process of its own. Task and result are JSON."""

import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import aiohttp

OK = 200
# Without a system message, the chat template would add one, and a prefix would take its place.
SYSTEM = "You are a helpful assistant. Answer briefly."


async def run_load(task: dict[str, Any]) -> dict[str, float]:
    """Send the requests of a task.

    Args:
        task: url, models, texts, number of clients and requests, tokens of an answer, and seed.

    Returns:
        Number of tokens, tokens per second of all clients, and medians of the time to the first token and between tokens in
        milliseconds.
    """
    draw = random.Random(task["seed"])
    # A number makes each prompt a new one, so that its text is in no cache.
    requests = [
        (draw.choice(task["models"]), f"({draw.random():.6f}) {draw.choice(task['texts'])}") for _ in range(task["requests"])
    ]
    waiting = iter(requests)
    answers: list[list[float]] = []
    start = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:

        async def run_client() -> None:
            for model, text in waiting:
                answers.append(await stream_answer(session, task, model, text))

        await asyncio.gather(*(run_client() for _ in range(task["clients"])))
    seconds = time.perf_counter() - start
    # The mean of an answer, because a server may send several tokens at once.
    gaps = [(times[-1] - times[1]) / (task["tokens"] - 1) for times in answers]
    return {
        "tokens": len(requests) * task["tokens"],
        "tokens_per_second": len(requests) * task["tokens"] / seconds,
        "first_token_ms": statistics.median(times[1] - times[0] for times in answers) * 1000,
        "between_tokens_ms": statistics.median(gaps) * 1000,
    }


async def stream_answer(session: aiohttp.ClientSession, task: dict[str, Any], model: str, text: str) -> list[float]:
    """Return the times of a request and of each chunk of its answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": task["tokens"], "temperature": 0}
    times = [time.perf_counter()]
    async with session.post(f"{task['url']}/v1/chat/completions", json=body | {"stream": True, "ignore_eos": True}) as reply:
        if reply.status != OK:
            raise SystemExit(f"{reply.status}: {(await reply.text())[:300]}")
        times += [time.perf_counter() async for line in reply.content if line.startswith(b"data: {") and b'"content":"' in line]
    return times


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run_load(json.loads(sys.argv[1])))))

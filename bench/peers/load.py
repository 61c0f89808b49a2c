"""A load of streaming chat requests on an OpenAI endpoint. Run by bench/serve.py in a process of its own: takes a task and
prints what it measured, both JSON."""

import asyncio
import json
import random
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import aiohttp

OK = 200
# Of the request's own: in the place of a template's, a prefix would make prompts shorter.
SYSTEM = "You are a helpful assistant. Answer briefly."


async def load(task: dict[str, Any]) -> dict[str, float]:
    """Ask with so many requests at once; tokens a second in all, and medians of both latencies in milliseconds."""
    draw = random.Random(task["seed"])
    # A number makes each prompt a new one, so that no cache answers for the engine.
    asked = [
        (draw.choice(task["models"]), f"({draw.random():.6f}) {draw.choice(task['texts'])}") for _ in range(task["requests"])
    ]
    waiting = iter(asked)
    answers: list[list[float]] = []
    began = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:

        async def client() -> None:
            for model, text in waiting:
                answers.append(await ask(session, task, model, text))

        await asyncio.gather(*(client() for _ in range(task["concurrent"])))
    seconds = time.perf_counter() - began
    gaps = [later - earlier for _, *pieces in answers for earlier, later in pairwise(pieces)]
    return {
        "tokens_per_second": len(asked) * task["tokens"] / seconds,
        "ttft_ms": statistics.median(times[1] - times[0] for times in answers) * 1000,
        "itl_ms": statistics.median(gaps) * 1000,
    }


async def ask(session: aiohttp.ClientSession, task: dict[str, Any], model: str, text: str) -> list[float]:
    """When the request was sent, and when each piece of its answer came."""
    said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"model": model, "messages": said, "max_tokens": task["tokens"], "temperature": 0}
    times = [time.perf_counter()]
    async with session.post(f"{task['url']}/v1/chat/completions", json=body | {"stream": True, "ignore_eos": True}) as reply:
        if reply.status != OK:
            raise SystemExit(f"{reply.status}: {(await reply.text())[:300]}")
        times += [time.perf_counter() async for line in reply.content if line.startswith(b"data: {") and b'"content":"' in line]
    return times


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(json.loads(sys.argv[1])))))

"""What a server does under more than it can take: wrong answers, lost room, memory, and how soon it is well again.

python bench/stress.py [--quick] [--json FILE]

Four things are done to it. A thousand prefixes go through 256 slots, and a sample of the answers is compared with those of
transformers. A hundred streams are left in the middle. Ten times as many clients as it has room for ask without a pause. A
second replica comes when there is much to do, and goes when there is little, under load all the time.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
from peers import servers
from peers.servers import Server, Up
from prometheus_client.parser import text_string_to_metric_families

from trimtab.artifacts.prefix import Prefix
from trimtab.data.questions import read_questions
from trimtab.generate import build_inputs
from trimtab.model.base_model import BaseModel, resolve_base_model

PREFIXES, SLOTS, CHECKED, TOKENS = 1000, 256, 200, 12
STREAMS, IDLE_SECONDS = 100, 2.0
ROOM, TIMES, OVERLOAD_SECONDS, WELL_SECONDS = 32, 10, 120.0, 10.0
GROWTH = 1.1
# Of two engines that start on the same two cores, and of ten seconds with little to do.
UP_SECONDS, DOWN_SECONDS = 180.0, 60.0
OK, BUSY = 200, (429, 503)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prefixes and streams, a shorter overload")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--only", choices=["prefixes", "overload", "scaling"], help="one of its servers")
    options = parser.parse_args()
    base, share = resolve_base_model(options.base), 10 if options.quick else 1
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        made = servers.random_prefixes(base, Path(name), PREFIXES // share, strength=4.0)
        sizes = ["--engine.num_slots", str(SLOTS // share), "--engine.max_model_len", "512", "--registry", name]
        # So that all streams run when their clients leave.
        wide = ["--engine.max_num_seqs", str(STREAMS + 28)]
        room = ["--max_ongoing_requests", str(ROOM // 2), "--max_queued_requests", str(ROOM - ROOM // 2)]
        scale = [
            "--num_replicas",
            "1",
            "--max_replicas",
            "2",
            "--target_ongoing_requests",
            "4",
            "--upscale_delay_s",
            "2",
            "--downscale_delay_s",
            "10",
        ]
        for kind, extra in (("prefixes", wide), ("overload", room), ("scaling", scale)):
            if options.only not in (None, kind):
                continue
            with servers.running(Server(kind, servers.trimtab(base.name, *sizes, *extra))) as up:
                if kind == "prefixes":
                    lines += [*many_prefixes(up, base, made, CHECKED // share), left(up, base, STREAMS // share)]
                elif kind == "overload":
                    lines += overload(up, base, OVERLOAD_SECONDS / share)
                else:
                    lines += scaling(up, base)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def many_prefixes(up: Up, base: BaseModel, prefixes: Sequence[Prefix], checked: int) -> list[dict[str, Any]]:
    """Every prefix is asked for twice, in an order of chance, 64 at a time; so many answers are those of transformers."""
    texts = [question.question for question in read_questions("trimtab:countries")]
    draw = random.Random(0)
    asked = [(number, draw.choice(texts)) for number in draw.sample(range(len(prefixes)), len(prefixes)) for _ in range(2)]
    draw.shuffle(asked)
    answers: dict[int, str] = {}

    async def one(session: aiohttp.ClientSession, index: int) -> None:
        number, text = asked[index]
        body = question(f"{base.name}:p{number}", text)
        async with session.post(f"{up.url}/v1/chat/completions", json=body) as reply:
            said = await reply.json()
            answers[index] = said["choices"][0]["message"]["content"] if reply.status == OK else str(said)

    began = time.perf_counter()
    asyncio.run(clients(one, len(asked), 64))
    seconds = time.perf_counter() - began
    sample = draw.sample(range(len(asked)), checked)
    wanted = references(base, [(prefixes[asked[index][0]], asked[index][1]) for index in sample])
    wrong = [index for index, text in zip(sample, wanted, strict=True) if answers[index] != text]
    for index in wrong[:3]:
        print(f"{asked[index]}: {answers[index]!r}", flush=True)
    return [
        line("stress.prefixes.wrong", len(wrong), f"of {checked} answers", 0)
        | {"prefixes": len(prefixes), "requests": len(asked), "requests_per_second": len(asked) / seconds}
    ]


def references(base: BaseModel, asked: Sequence[tuple[Prefix, str]]) -> list[str]:
    """Greedy answers of transformers, one at a time."""
    model, tokenizer, found = base.load("fp32"), base.tokenizer(), list[str]()
    for prefix, text in asked:
        given = build_inputs(model, base, [[{"role": "user", "content": text}]], prefix)
        ids: Any = model.generate(  # pyright: ignore[reportCallIssue]
            **given, max_new_tokens=TOKENS, do_sample=False
        )
        found.append(str(tokenizer.decode(ids[0], skip_special_tokens=True)))
    return found


def left(up: Up, base: BaseModel, count: int) -> dict[str, Any]:
    """So many clients go away after the first piece of a long stream."""

    async def run() -> float:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            body = question(base.name, "Tell me a long story.") | {"max_tokens": 150, "stream": True, "ignore_eos": True}
            replies = await asyncio.gather(*(session.post(f"{up.url}/v1/chat/completions", json=body) for _ in range(count)))
            await asyncio.gather(*(reply.content.readany() for reply in replies))
            ran = running(up)
            for reply in replies:
                reply.close()
            return ran

    ran = asyncio.run(run())
    began = time.perf_counter()
    while running(up):
        time.sleep(0.05)
    return line("stress.left_streams.idle_after", time.perf_counter() - began, "s", IDLE_SECONDS) | {"streams": ran}


def overload(up: Up, base: BaseModel, seconds: float) -> list[dict[str, Any]]:
    """Ten times as many clients as there is room for, who ask again as soon as they are answered, or may."""
    alone = statistics.median(timed(up, base) for _ in range(5))
    calm, _ = hammer(up, base, ROOM, seconds / 4)
    before = memory(up)
    statuses, most = hammer(up, base, ROOM * TIMES, seconds)
    stopped = time.perf_counter()
    while timed(up, base) > 2 * alone:
        pass
    well = time.perf_counter() - stopped
    others = sum(count for status, count in statuses.items() if status != OK and status not in BUSY)
    kept = (statuses[OK] / seconds) / (calm[OK] / (seconds / 4))
    return [
        line("stress.overload.other_statuses", others, "answers that are neither 200 nor 429 nor 503", 0)
        | {"statuses": {str(status): count for status, count in sorted(statuses.items())}, "seconds": seconds},
        line("stress.overload.memory", most / before, "times that before", GROWTH) | {"gib": most / 2**30},
        line("stress.overload.well_after", well, "s", WELL_SECONDS) | {"alone_seconds": alone},
        line("stress.overload.kept", kept, "of the answers a second without overload", None)
        | {"answers_per_second": statuses[OK] / seconds},
    ]


def hammer(up: Up, base: BaseModel, together: int, seconds: float) -> tuple[Counter[int], int]:
    """So many clients at a time; how often each status came, and the most memory that the server took."""
    statuses, ended, most = Counter[int](), time.perf_counter() + seconds, 0

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal most
        while time.perf_counter() < ended:
            body = question(base.name, f"Count to {number}.") | {"max_tokens": 32, "ignore_eos": True}
            try:
                async with session.post(f"{up.url}/v1/chat/completions", json=body) as reply:
                    await reply.read()
                    statuses[reply.status] += 1
                    await asyncio.sleep(float(reply.headers.get("retry-after", 0)))
            except aiohttp.ClientError:
                statuses[0] += 1
            if number == 0:
                most = max(most, memory(up))

    asyncio.run(clients(client, together, together))
    return statuses, most


def scaling(up: Up, base: BaseModel) -> list[dict[str, Any]]:
    """16 clients until a second replica answers, then one until it is gone; no answer is lost on the way."""
    failed, times, most = 0, dict[str, float](), 16

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal failed, most
        while number < most:
            body = question(base.name, f"Count to {number}.") | {"max_tokens": 32, "ignore_eos": True}
            try:
                async with session.post(f"{up.url}/v1/chat/completions", json=body) as reply:
                    failed += reply.status != OK
                    await reply.read()
            except aiohttp.ClientError:
                failed += 1

    async def watch() -> None:
        nonlocal most
        for name, count, clients_left in (("up", 2, 1), ("down", 1, 0)):
            began = time.perf_counter()
            while await asyncio.to_thread(replicas, up) != count:
                await asyncio.sleep(0.5)
            times[name] = time.perf_counter() - began
            print(f"{count} replicas after {times[name]:.0f} s", flush=True)
            most = clients_left

    async def run() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
            await asyncio.gather(watch(), *(client(session, number) for number in range(most)))

    asyncio.run(run())
    return [
        line("stress.scaling.failed", failed, "answers that failed", 0),
        line("stress.scaling.up_after", times["up"], "s", UP_SECONDS),
        line("stress.scaling.down_after", times["down"], "s", DOWN_SECONDS),
    ]


def replicas(up: Up) -> int:
    """Replicas that /metrics knows of."""
    text = httpx.get(f"{up.url}/metrics", timeout=60).text
    return len({part.split('"')[0] for part in text.split('replica="')[1:]})


def question(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}


async def clients(one: Any, count: int, together: int) -> None:
    """Call `one` with each number, so many at a time."""
    numbers = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)) as session:

        async def client() -> None:
            for number in numbers:
                await one(session, number)

        await asyncio.gather(*(client() for _ in range(together)))


def timed(up: Up, base: BaseModel) -> float:
    began = time.perf_counter()
    httpx.post(f"{up.url}/v1/chat/completions", json=question(base.name, "Say hello."), timeout=120).raise_for_status()
    return time.perf_counter() - began


def running(up: Up) -> float:
    """Requests that the engine runs or keeps waiting."""
    families = text_string_to_metric_families(httpx.get(f"{up.url}/metrics", timeout=30).text)
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(sample.value for family in families for sample in family.samples if sample.name in names)


def memory(up: Up) -> int:
    """Bytes that the server's processes take."""
    found = [psutil.Process(up.process.pid), *psutil.Process(up.process.pid).children(recursive=True)]
    total = 0
    for process in found:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def line(name: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    met = None if goal is None else value <= goal
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None, "goal": goal, "met": met}


if __name__ == "__main__":
    main()

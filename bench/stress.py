"""Server under stress: wrong answers, disconnected clients, overload, memory and autoscaling.

python bench/stress.py [--quick] [--only prefixes|overload|scaling] [--json FILE]

Three servers start one after the other. The first serves 1,000 prefixes from 256 slots, and a sample of its answers is compared
with those of transformers. Then 100 clients disconnect from streams. The second server receives requests from ten times as many
clients as it accepts. The third server starts a second replica under load, and stops it when the load ends.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
from peers import servers
from peers.servers import RunningServer, Server
from prometheus_client.parser import text_string_to_metric_families

from trimtab.artifacts.prefix import Prefix
from trimtab.data.questions import read_questions
from trimtab.generate import build_inputs
from trimtab.model.base_model import BaseModel, resolve_base_model

SERVERS = ("prefixes", "overload", "scaling")
PREFIXES, SLOTS, CHECKED_ANSWERS, ANSWER_TOKENS = 1000, 256, 200, 12
PREFIX_CLIENTS, REQUESTS_PER_PREFIX = 64, 2
STREAMS, EXTRA_SEQUENCES, STREAM_TOKENS = 100, 28, 150
CAPACITY, OVERLOAD_FACTOR, OVERLOAD_SECONDS, LOAD_TOKENS = 32, 10, 120.0, 32
SCALING_CLIENTS = 16
QUICK_DIVISOR = 10
# Goals: seconds until the engine is idle, growth of the memory, and seconds until the latency is normal.
MAX_IDLE_SECONDS, MAX_MEMORY_RATIO, MAX_RECOVERY_SECONDS = 2.0, 1.1, 10.0
# Two engines start on the same two cores. A replica stops after ten seconds of low load.
MAX_UPSCALE_SECONDS, MAX_DOWNSCALE_SECONDS = 180.0, 60.0
OK, BUSY = 200, (429, 503)


def main() -> None:
    options = parse_arguments()
    base, divisor = resolve_base_model(options.base), QUICK_DIVISOR if options.quick else 1
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        prefixes = servers.save_random_prefixes(base, Path(name), PREFIXES // divisor, strength=4.0)
        common = ["--engine.num_slots", str(SLOTS // divisor), "--engine.max_model_len", "512", "--registry", name]
        for server_name in SERVERS:
            if options.only not in (None, server_name):
                continue
            command = servers.build_trimtab_command(base.name, *common, *build_server_options(server_name))
            with servers.run_server(Server(server_name, command)) as server:
                if server_name == "prefixes":
                    lines += measure_prefixes(server, base, prefixes, CHECKED_ANSWERS // divisor)
                    lines.append(measure_disconnects(server, base, STREAMS // divisor))
                elif server_name == "overload":
                    lines += measure_overload(server, base, OVERLOAD_SECONDS / divisor)
                else:
                    lines += measure_scaling(server, base)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prefixes and streams, a shorter overload")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--only", choices=SERVERS, help="start this server only")
    return parser.parse_args()


def build_server_options(name: str) -> list[str]:
    """Build the command-line options that are specific to a server."""
    if name == "prefixes":
        # All streams must run when their clients disconnect.
        return ["--engine.max_num_seqs", str(STREAMS + EXTRA_SEQUENCES)]
    if name == "overload":
        return ["--max_ongoing_requests", str(CAPACITY // 2), "--max_queued_requests", str(CAPACITY - CAPACITY // 2)]
    replicas = ["--num_replicas", "1", "--max_replicas", "2", "--target_ongoing_requests", "4"]
    return [*replicas, "--upscale_delay_s", "2", "--downscale_delay_s", "10"]


def measure_prefixes(server: RunningServer, base: BaseModel, prefixes: Sequence[Prefix], checked: int) -> list[dict[str, Any]]:
    """Send two requests for each prefix in random order, and compare a sample of the answers with those of transformers.

    Args:
        server: the server.
        base: base model.
        prefixes: the prefixes p0, p1, ... of the server.
        checked: number of answers in the sample.
    """
    texts = [question.question for question in read_questions("trimtab:countries")]
    generator = random.Random(0)
    requests = [
        (number, generator.choice(texts))
        for number in generator.sample(range(len(prefixes)), len(prefixes))
        for _ in range(REQUESTS_PER_PREFIX)
    ]
    generator.shuffle(requests)
    answers: dict[int, str] = {}

    async def send_request(session: aiohttp.ClientSession, index: int) -> None:
        number, text = requests[index]
        body = build_body(f"{base.name}:p{number}", text)
        async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
            content = await response.json()
            answers[index] = content["choices"][0]["message"]["content"] if response.status == OK else str(content)

    start = time.perf_counter()
    asyncio.run(run_clients(send_request, len(requests), PREFIX_CLIENTS))
    seconds = time.perf_counter() - start
    sample = generator.sample(range(len(requests)), checked)
    expected = generate_references(base, [(prefixes[requests[index][0]], requests[index][1]) for index in sample])
    wrong = [index for index, text in zip(sample, expected, strict=True) if answers[index] != text]
    for index in wrong[:3]:
        print(f"{requests[index]}: {answers[index]!r}", flush=True)
    return [
        build_line("stress.prefixes.wrong", len(wrong), f"of {checked} answers", 0)
        | {"prefixes": len(prefixes), "requests": len(requests), "requests_per_second": len(requests) / seconds}
    ]


def generate_references(base: BaseModel, requests: Sequence[tuple[Prefix, str]]) -> list[str]:
    """Generate greedy answers with transformers, one at a time."""
    model, tokenizer = base.load("fp32"), base.tokenizer()
    answers: list[str] = []
    for prefix, text in requests:
        inputs = build_inputs(model, base, [[{"role": "user", "content": text}]], prefix)
        ids: Any = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        answers.append(str(tokenizer.decode(ids[0], skip_special_tokens=True)))
    return answers


def measure_disconnects(server: RunningServer, base: BaseModel, count: int) -> dict[str, Any]:
    """Disconnect clients after the first chunk of their streams, and measure the time until the engine is idle."""

    async def disconnect_streams() -> float:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            body = build_body(base.name, "Tell me a long story.")
            body |= {"max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True}
            url = f"{server.url}/v1/chat/completions"
            responses = await asyncio.gather(*(session.post(url, json=body) for _ in range(count)))
            await asyncio.gather(*(response.content.readany() for response in responses))
            active = count_requests(server)
            for response in responses:
                response.close()
            return active

    streams = asyncio.run(disconnect_streams())
    start = time.perf_counter()
    while count_requests(server):
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    return build_line("stress.left_streams.idle_after", seconds, "s", MAX_IDLE_SECONDS) | {"streams": streams}


def measure_overload(server: RunningServer, base: BaseModel, seconds: float) -> list[dict[str, Any]]:
    """Measure statuses, memory, recovery and throughput with ten times as many clients as the server accepts."""
    latency = statistics.median(measure_latency(server, base) for _ in range(5))
    normal_statuses, _ = run_load(server, base, CAPACITY, seconds / 4)
    memory = measure_memory(server)
    statuses, peak_memory = run_load(server, base, CAPACITY * OVERLOAD_FACTOR, seconds)
    end = time.perf_counter()
    while measure_latency(server, base) > 2 * latency:
        pass
    recovery = time.perf_counter() - end
    others = sum(count for status, count in statuses.items() if status != OK and status not in BUSY)
    throughput_ratio = (statuses[OK] / seconds) / (normal_statuses[OK] / (seconds / 4))
    return [
        build_line("stress.overload.other_statuses", others, "answers that are neither 200 nor 429 nor 503", 0)
        | {"statuses": {str(status): count for status, count in sorted(statuses.items())}, "seconds": seconds},
        build_line("stress.overload.memory", peak_memory / memory, "times that before", MAX_MEMORY_RATIO)
        | {"gib": peak_memory / 2**30},
        build_line("stress.overload.well_after", recovery, "s", MAX_RECOVERY_SECONDS) | {"alone_seconds": latency},
        build_line("stress.overload.kept", throughput_ratio, "of the answers a second without overload", None)
        | {"answers_per_second": statuses[OK] / seconds},
    ]


def run_load(server: RunningServer, base: BaseModel, clients: int, seconds: float) -> tuple[Counter[int], int]:
    """Send requests from concurrent clients without a pause, except for the time in `Retry-After`.

    Returns:
        Number of responses by status, with 0 for connection errors, and peak memory of the server in bytes.
    """
    statuses, deadline, peak_memory = Counter[int](), time.perf_counter() + seconds, 0

    async def run_client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal peak_memory
        while time.perf_counter() < deadline:
            body = build_body(base.name, f"Count to {number}.") | {"max_tokens": LOAD_TOKENS, "ignore_eos": True}
            try:
                async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                    await response.read()
                    statuses[response.status] += 1
                    await asyncio.sleep(float(response.headers.get("retry-after", 0)))
            except aiohttp.ClientError:
                statuses[0] += 1
            if number == 0:
                peak_memory = max(peak_memory, measure_memory(server))

    asyncio.run(run_clients(run_client, clients, clients))
    return statuses, peak_memory


def measure_scaling(server: RunningServer, base: BaseModel) -> list[dict[str, Any]]:
    """Run 16 clients until a second replica answers, then one client until it is removed, and count failed requests."""
    failed, active_clients = 0, SCALING_CLIENTS
    times: dict[str, float] = {}

    async def run_client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal failed
        while number < active_clients:
            body = build_body(base.name, f"Count to {number}.") | {"max_tokens": LOAD_TOKENS, "ignore_eos": True}
            try:
                async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                    failed += response.status != OK
                    await response.read()
            except aiohttp.ClientError:
                failed += 1

    async def watch_replicas() -> None:
        nonlocal active_clients
        for direction, replicas, next_clients in (("up", 2, 1), ("down", 1, 0)):
            start = time.perf_counter()
            while await asyncio.to_thread(count_replicas, server) != replicas:
                await asyncio.sleep(0.5)
            times[direction] = time.perf_counter() - start
            print(f"{replicas} replicas after {times[direction]:.0f} s", flush=True)
            active_clients = next_clients

    async def run_all() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
            await asyncio.gather(watch_replicas(), *(run_client(session, number) for number in range(SCALING_CLIENTS)))

    asyncio.run(run_all())
    return [
        build_line("stress.scaling.failed", failed, "answers that failed", 0),
        build_line("stress.scaling.up_after", times["up"], "s", MAX_UPSCALE_SECONDS),
        build_line("stress.scaling.down_after", times["down"], "s", MAX_DOWNSCALE_SECONDS),
    ]


def count_replicas(server: RunningServer) -> int:
    """Count the replicas in the metrics of a server."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return len({part.split('"')[0] for part in text.split('replica="')[1:]})


def build_body(model: str, text: str) -> dict[str, Any]:
    """Build the body of a greedy chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": ANSWER_TOKENS, "temperature": 0}


async def run_clients(call: Callable[[aiohttp.ClientSession, int], Awaitable[None]], count: int, clients: int) -> None:
    """Call a function with each number below `count` from concurrent clients."""
    numbers = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)) as session:

        async def run_client() -> None:
            for number in numbers:
                await call(session, number)

        await asyncio.gather(*(run_client() for _ in range(clients)))


def measure_latency(server: RunningServer, base: BaseModel) -> float:
    """Return the seconds of one request."""
    start = time.perf_counter()
    body = build_body(base.name, "Say hello.")
    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()
    return time.perf_counter() - start


def count_requests(server: RunningServer) -> float:
    """Count the running and waiting requests of the engine."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(sample.value for family in families for sample in family.samples if sample.name in names)


def measure_memory(server: RunningServer) -> int:
    """Return the resident memory of all processes of a server, in bytes."""
    parent = psutil.Process(server.process.pid)
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def build_line(name: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    """Build a line of the report, whose value must not exceed the goal."""
    met = None if goal is None else value <= goal
    return {"name": name, "value": value, "unit": unit, "peer": None, "ratio": None, "goal": goal, "met": met}


if __name__ == "__main__":
    main()

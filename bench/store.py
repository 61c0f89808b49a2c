"""Cost of stored signals: CPU time per 1,000 tokens with and without them, and memory under load.

python bench/store.py [--quick] [--minutes 10] [--json FILE]

Two servers with a detector of answers and one of prompts, with and without `--keep_signals`. They run one after the other, in
turns; clients stream answers as fast as the server can. The CPU time is that of all processes of the server. Then the server
with stored signals runs for the given minutes, and the growth of the memory of each process is estimated.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from peers import servers
from peers.costs import read_cpu_seconds
from peers.detectors import save_untrained_detector, save_untrained_guard
from peers.homes import own_home
from peers.processes import ProcessSamples, estimate_slope
from peers.ratios import bootstrap_mean, decide_at_most
from peers.servers import RunningServer, Server

from trimtab.model.base_model import resolve_base_model

CLIENTS, TOKENS = 8, 32
ROUNDS, ROUND_SECONDS, QUICK_SECONDS = 5, 40.0, 10.0
MINUTES, QUICK_MINUTES, SAMPLE_SECONDS, WARM_UP = 10.0, 1.0, 5.0, 0.3
# Ratio of CPU times, and growth in MB per minute, that must not be exceeded.
GOAL, LIMIT = 1.05, 0.5
LAYER = 18
QUESTIONS = ("What is the capital of France?", "How do I bake bread?", "Tell me a story.", "Who are you?", "What is rain?")


def main() -> None:
    options = parse_arguments()
    rounds, seconds = (2, QUICK_SECONDS) if options.quick else (options.rounds, ROUND_SECONDS)
    minutes = QUICK_MINUTES if options.quick else options.minutes
    with tempfile.TemporaryDirectory(prefix="store-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own_home(folder / "home")
        base = resolve_base_model(options.base)
        save_untrained_detector(base, folder / "registry")
        save_untrained_guard(base, folder / "registry", LAYER)
        plain = servers.build_trimtab_command(
            base.name, "--registry", str(folder / "registry"), "--engine.max_model_len", "512"
        )
        stored = [*plain, "--keep_signals", str(folder / "signals"), "--signals_flush_s", "5"]
        commands = {"without": plain, "with": stored}
        costs: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds):
            for mode in commands if number % 2 == 0 else reversed(commands):
                with servers.run_server(Server(mode, commands[mode])) as up:
                    costs[mode].append(measure_cost(up, base.name, seconds))
                    print(f"{number + 1} {mode}: {costs[mode][-1]:.2f} s of CPU per 1,000 tokens", flush=True)
        lines = [report_cost(costs)]
        with servers.run_server(Server("with", stored)) as up:
            lines += measure_memory(up, base.name, 60 * minutes)
            lines += report_rows(up.url)
        size = sum(path.stat().st_size for path in (folder / "signals").rglob("*.parquet"))
        lines.append({"name": "store.size", "value": size / 1e6, "unit": "MB", "peer": None, "ratio": None, "goal": None})
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds and a minute")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="duration of the load for the memory")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def measure_cost(up: RunningServer, base: str, seconds: float) -> float:
    """Return the CPU seconds of all processes of a server per 1,000 tokens under load."""
    asyncio.run(run_load(up.url, base, seconds / 4))
    before, tokens = sum(read_cpu_seconds(up.process.pid).values()), asyncio.run(run_load(up.url, base, seconds))
    return (sum(read_cpu_seconds(up.process.pid).values()) - before) / tokens * 1000


async def run_load(url: str, base: str, seconds: float) -> int:
    """Stream answers with all clients, and return the number of tokens."""
    until, tokens = time.monotonic() + seconds, 0

    async def run_client(number: int) -> None:
        nonlocal tokens
        sent = 0
        while time.monotonic() < until:
            text = f"({number}.{sent}) {QUESTIONS[sent % len(QUESTIONS)]}"
            body = {"model": base, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "stream": True}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body | {"ignore_eos": True}) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    pass
            tokens += TOKENS
            sent += 1

    async with httpx.AsyncClient(timeout=300) as client:
        await asyncio.gather(*(run_client(number) for number in range(CLIENTS)))
    return tokens


def report_cost(costs: dict[str, list[float]]) -> dict[str, Any]:
    """Build the line of the ratio of CPU times, paired by round."""
    ratios = np.array(costs["with"]) / np.array(costs["without"])
    low, high = bootstrap_mean(ratios.tolist())
    met = decide_at_most(low, high, GOAL)
    line = {"name": "store.cpu_seconds_per_1000_tokens", "value": float(np.mean(costs["with"])), "unit": "s"}
    line |= {"peer": {"without": float(np.mean(costs["without"]))}, "ratio": float(ratios.mean())}
    return line | {"low": low, "high": high, "goal": GOAL, "met": met}


def measure_memory(up: RunningServer, base: str, seconds: float) -> list[dict[str, Any]]:
    """Run the load and estimate the growth of each process."""
    samples = ProcessSamples(up.process.pid)

    async def sample_and_load() -> None:
        load = asyncio.create_task(run_load(up.url, base, seconds))
        while not load.done():
            await asyncio.to_thread(samples.take)
            await asyncio.wait([load], timeout=SAMPLE_SECONDS)
        await load

    asyncio.run(sample_and_load())
    return [build_slope_line(name, taken) for name, taken in samples.list_lasting(WARM_UP * seconds).items()]


def build_slope_line(name: str, taken: Sequence[Any]) -> dict[str, Any]:
    """Build the line of the growth of a process."""
    slope = estimate_slope(list(taken))
    met = decide_at_most(slope.low, slope.high, LIMIT)
    line = {"name": f"store.growth.{name}", "value": slope.value, "unit": "MB/minute", "peer": None, "ratio": None}
    return line | {"low": slope.low, "high": slope.high, "goal": LIMIT, "met": met}


def report_rows(url: str) -> list[dict[str, Any]]:
    """Build the lines of the stored and lost rows."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    lines: list[dict[str, Any]] = []
    for name in ("trimtab_signals_stored_total", "trimtab_signals_lost_total"):
        values = [float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(name)]
        lines.append({"name": f"store.{name}", "value": sum(values), "unit": "rows", "peer": None, "ratio": None, "goal": None})
    return lines


if __name__ == "__main__":
    main()

"""Throughput, latency, CPU time and memory of servers: vLLM's own, ray.serve.llm, vLLM with LoRA adapters, and trimtab.

python bench/serve.py [--quick] [--only vllm ray trimtab] [--out serve-rounds.jsonl] [--json FILE] [--plot FILE]

One machine, and the same engine settings, prompts and load for all servers. Each round starts every server once, one after the
other, in alternating order, and sends every load to each of its modes. Answers stream and have one length. The load comes from
a process of its own. Ratios are paired by round. Each measurement is appended to the output file, so that the command can be
interrupted and repeated; `--only` measures some servers of a round, and a later command the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peers import servers
from peers.costs import divide_increase, measure_memory, read_cpu_seconds
from peers.homes import own_home
from peers.serve_modes import PREFIXES, QUICK_PREFIXES, SERVERS, build_servers
from peers.serve_report import Measurement, build_report, read_measurements
from peers.servers import RunningServer, Server

from trimtab.data.questions import read_questions
from trimtab.model.base_model import resolve_base_model

LOAD = Path(__file__).parent / "peers" / "load.py"
TOKENS = 32
CLIENTS, QUICK_CLIENTS = (1, 8, 32, 64), (1, 8)
REQUESTS_PER_CLIENT, MIN_REQUESTS = 3, 16
# A seed that no load has: prompts of the warm-up are in the prefix cache.
WARM_UP_CLIENTS, WARM_UP_SEED = 32, 10**9
IDLE_SECONDS, QUICK_IDLE_SECONDS = 20.0, 5.0


def main() -> None:
    options = parse_arguments()
    path = Path(options.out)
    with tempfile.TemporaryDirectory(prefix="serve-", ignore_cleanup_errors=True) as name:
        own_home(Path(name) / "home")
        base = resolve_base_model(options.base)
        selected = [server for server in build_servers(base, Path(name), options.prefixes) if server.name in options.only]
        for number in range(1 if options.quick else options.rounds):
            for server in selected if number % 2 == 0 else reversed(selected):
                measure_server(server, number, path, options.quick)
    measurements = read_measurements(path)
    lines = build_report(measurements)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")
    if options.plot:
        # Matplotlib is needed for the plot only.
        from peers.serve_plot import plot_throughput

        plot_throughput(measurements, Path(options.plot))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, fewer prefixes and clients")
    parser.add_argument(
        "--out", default="serve-rounds.jsonl", help="file of the measurements, where a repeated command continues"
    )
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="write the throughput against the number of prefixes to this PNG or SVG file")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=SERVERS, help="servers to start")
    parser.add_argument("--prefixes", nargs="*", type=int, help="numbers of prefixes to measure, besides trimtab without one")
    options = parser.parse_args()
    if options.prefixes is None:
        options.prefixes = QUICK_PREFIXES if options.quick else PREFIXES
    return options


def measure_server(server: Server, number: int, path: Path, quick: bool) -> None:
    """Start a server and measure what the file of measurements lacks for this round."""
    clients = QUICK_CLIENTS if quick else CLIENTS
    done = {(one.mode, one.clients) for one in read_measurements(path) if one.round == number}
    missing = {
        mode: [count for count in (0, *clients) if (mode, count) not in done and (count or mode == next(iter(server.models)))]
        for mode in server.models
    }
    if not any(missing.values()):
        return
    with servers.run_server(server) as up:
        for models in server.models.values():
            send_load(up.url, models[:8], WARM_UP_CLIENTS, seed=WARM_UP_SEED)
        # In turns, so that no mode is always the first one after a start.
        modes = list(missing.items())
        for mode, counts in modes if number % 2 == 0 else reversed(modes):
            for count in counts:
                values = measure_load(up, server.models[mode], count, number) if count else measure_idle(up, quick)
                measurement = Measurement(number, mode, count, values)
                with path.open("a") as file:
                    file.write(measurement.to_json() + "\n")
                print(f"{number + 1} {mode}, {count} clients: {format_values(values)}", flush=True)


def measure_idle(up: RunningServer, quick: bool) -> dict[str, float]:
    """Measure the CPU time of a server without requests, in hundredths of a core, in all and by role of the process."""
    before, seconds = read_cpu_seconds(up.process.pid), QUICK_IDLE_SECONDS if quick else IDLE_SECONDS
    time.sleep(seconds)
    roles = divide_increase(before, read_cpu_seconds(up.process.pid), seconds / 100)
    return {"idle": sum(roles.values())} | {f"idle {role}": value for role, value in roles.items()}


def measure_load(up: RunningServer, models: Sequence[str], clients: int, number: int) -> dict[str, float]:
    """Send one load, and measure the CPU time per 1,000 tokens, in all and by role, and the memory after it."""
    pid = up.process.pid
    before = read_cpu_seconds(pid)
    values = send_load(up.url, models, clients, seed=1000 * number + clients)
    roles = divide_increase(before, read_cpu_seconds(pid), values["tokens"] / 1000)
    return (
        values | {"cpu": sum(roles.values()), "memory": measure_memory(pid)} | {f"cpu {role}": s for role, s in roles.items()}
    )


def send_load(url: str, models: Sequence[str], clients: int, *, seed: int) -> dict[str, float]:
    """Send a load from a process of its own, and return its measurements."""
    texts = [question.question for question in read_questions("trimtab:countries")]
    task = {"url": url, "models": list(models), "texts": texts, "tokens": TOKENS, "seed": seed, "clients": clients}
    task["requests"] = max(MIN_REQUESTS, REQUESTS_PER_CLIENT * clients)
    completed = subprocess.run([sys.executable, str(LOAD), json.dumps(task)], capture_output=True, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(f"the load failed: {completed.stderr.strip().splitlines()[-1]}")
    return json.loads(completed.stdout)


def format_values(values: dict[str, float]) -> str:
    """Format the totals of a measurement."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if " " not in name)


if __name__ == "__main__":
    main()

"""Time and CPU time until commands begin their work, in a home with the base model and without earlier results.

python bench/startup.py [--quick] [--rounds N] [--json FILE]

- `help`: `trimtab --help`, from start to end.
- `align`: `trimtab align` until the first training step, and the lines that it prints before, with their times.
- `serve`: `trimtab serve` until it lists its models, and vLLM's own server as a peer.

The measurements of a round take turns, in alternating order. CPU time is that of the command and of its processes that
run when its work begins.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from peers import servers
from peers.costs import list_processes, read_cpu_seconds
from peers.homes import own_home
from peers.servers import Server

from trimtab.model.base_model import resolve_base_model

STOP_SECONDS = 60
FIRST_STEP = re.compile(r"^train.*: [1-9]")
ALIGN_OPTIONS = {
    "name": "startup",
    "data.harmful": '["trimtab:pairs"]',
    "data.benign": '["trimtab:pairs"]',
    "data.limit": "40",
    "condition.detector": "null",
    "train.max_steps": "50",
}

Result = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    results: dict[str, list[Result]] = {"help": [], "align": [], "serve": [], "vllm": []}
    for number in range(1 if options.quick else options.rounds):
        for name in results if number % 2 == 0 else reversed(results):
            with tempfile.TemporaryDirectory(prefix="startup-", ignore_cleanup_errors=True) as folder:
                own_home(Path(folder))
                result = measure(name, options.base)
            results[name].append(result)
            print(f"{number + 1} {name}: {result['seconds']:.1f} s, {result['cpu']:.1f} s of CPU time", flush=True)
            for seconds, line in result.get("lines", ()):
                print(f"    {seconds:6.1f} s  {line[:100]}", flush=True)
    lines = [
        {"name": f"startup.{name}.{key}", "value": statistics.median(values), "unit": "s", "spread": [min(values), max(values)]}
        | dict.fromkeys(("peer", "ratio", "goal", "met"))
        for name, measured in results.items()
        for key in ("seconds", "cpu")
        if (values := [result[key] for result in measured])
    ]
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def measure(name: str, base: str) -> Result:
    """Measure one command: seconds and CPU seconds until it begins its work, and the lines that it printed until then."""
    if name in ("serve", "vllm"):
        return measure_server(name, base)
    options = [text for key, value in ALIGN_OPTIONS.items() for text in (f"--{key}", value)]
    command = [sys.executable, "-m", "trimtab"]
    if name == "help":
        return measure_to_end([*command, "--help"])
    return measure_until([*command, "align", "--base", base, *options], FIRST_STEP)


def measure_server(name: str, base: str) -> Result:
    """Measure a server until it lists its models."""
    command = servers.build_trimtab_command(base)
    if name == "vllm":
        command = servers.build_vllm_command(str(resolve_base_model(base).path), base)
    environment = servers.VLLM_ENVIRONMENT if name == "vllm" else {}
    start = time.monotonic()
    with servers.run_server(Server(name, command, environment=environment)) as up:
        return {"seconds": time.monotonic() - start, "cpu": sum(read_cpu_seconds(up.process.pid).values())}


def measure_to_end(command: Sequence[str]) -> Result:
    """Measure a command from its start to its end."""
    start, before = time.monotonic(), os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu": cpu}


def measure_until(command: Sequence[str], marker: re.Pattern[str]) -> Result:
    """Measure a command until it prints a line that matches the marker, and end it."""
    start, lines = time.monotonic(), list[tuple[float, str]]()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert process.stdout is not None
    for line in map(bytes.decode, process.stdout):
        seconds = time.monotonic() - start
        lines.append((seconds, line.rstrip()))
        if marker.search(line):
            cpu = sum(read_cpu_seconds(process.pid).values())
            end_processes(process)
            return {"seconds": seconds, "cpu": cpu, "lines": lines}
    sys.exit(f"the command ended before its work began: {lines[-1][1] if lines else 'no output'}")


def end_processes(process: "subprocess.Popen[bytes]") -> None:
    """End a command and the processes that it leaves."""
    children = list_processes(process.pid)[1:]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=STOP_SECONDS)
    for child in psutil.wait_procs(children, timeout=STOP_SECONDS)[1]:
        child.kill()


if __name__ == "__main__":
    main()

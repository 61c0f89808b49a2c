"""Seconds to train detector heads on a device, against the CPU of the same machine.

python bench/heads.py [--quick] [--device cuda] [--width 4096] [--json FILE]

The signals are random, with labels that a direction in them determines. Each head trains with its own schedule. Needs torch
alone beside trimtab's core.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trimtab import heads
from trimtab.heads import DetectorRows

HEADS = ("linear", "saplma", "mlp", "flag")
ROWS, QUICK_ROWS, LAYERS, TRACE = 10_000, 1_000, 2, 7
REPEATS = 3
# Minimum ratio of the time on the CPU to the time on the device.
GOAL = 2.0


def main() -> None:
    options = parse_arguments()
    rows = QUICK_ROWS if options.quick else ROWS
    devices = dict.fromkeys(("cpu", options.device))
    times: dict[tuple[str, str], list[float]] = {}
    for device in devices:
        data = build_rows(rows, options.width, device)
        for name in HEADS:
            for _ in range(1 if options.quick else REPEATS):
                times.setdefault((name, device), []).append(measure_training(name, data, options.width, device))
            print(f"{name} on {device}: {statistics.median(times[name, device]):.2f} s", flush=True)
    lines = [build_line(name, times, options.device, rows) for name in HEADS]
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=1024, help="width of the base model")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def build_rows(count: int, width: int, device: str) -> tuple[DetectorRows, DetectorRows]:
    """Build training and validation rows on a device."""
    generator = torch.Generator().manual_seed(0)
    psi = torch.randn(count, LAYERS, 3 * width, generator=generator)
    truthful = (psi[:, -1, :8].sum(1) + torch.randn(count, generator=generator) > 0).float()
    rows = DetectorRows(psi.to(device), torch.randn(count, TRACE, generator=generator).to(device), truthful.to(device))
    order = torch.arange(count)
    return rows[order[count // 5 :]], rows[order[: count // 5]]


def measure_training(name: str, data: tuple[DetectorRows, DetectorRows], width: int, device: str) -> float:
    """Return the seconds to train a new head."""
    torch.manual_seed(0)
    head_class = heads.get_head(name)
    train, validation = data if head_class.joint else tuple(rows.select_layers([LAYERS - 1]) for rows in data)
    head = head_class(width, train.psi.shape[1]).to(device)
    synchronize(device)
    start = time.perf_counter()
    head.fit(train, validation, 0)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def build_line(name: str, times: dict[tuple[str, str], list[float]], device: str, rows: int) -> dict[str, Any]:
    """Build the line of a head: seconds on the device, against the CPU."""
    own, cpu = times[name, device], times[name, "cpu"]
    ratio = statistics.median(cpu) / statistics.median(own)
    line = {"name": f"heads.{name}.{rows}", "value": statistics.median(own), "unit": "s", "spread": [min(own), max(own)]}
    line |= {"peer": {"cpu": statistics.median(cpu)}, "ratio": ratio}
    if device == "cpu":
        return line | {"goal": None, "met": None}
    slowest = min(cpu) / max(own)
    return line | {"goal": GOAL, "met": True if slowest >= GOAL else False if max(cpu) / min(own) < GOAL else None}


if __name__ == "__main__":
    main()

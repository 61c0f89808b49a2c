"""Measurements of bench/serve.py, and the report on their ratios."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.ratios import bootstrap_mean, decide_at_most

VLLM, RAY, TRIMTAB = "vllm", "ray.serve.llm", "trimtab"
# Processes of trimtab and of vLLM that handle requests; Ray's other processes are not among them.
SERVING = ("replica", "proxy", "engine core", "trimtab serve")
# Throughput of trimtab must be at least this share of vLLM's; it was decided for 8 clients and more.
THROUGHPUT_GOAL, THROUGHPUT_CLIENTS = 0.95, 8
CPU_GOAL, FIRST_TOKEN_GOAL_MS = 1.15, 10.0
PREFIX_GOAL, DETECTOR_GOAL = 0.99, 0.98
# The interval of fewer rounds is too narrow to decide a goal.
MIN_ROUNDS = 3
UNITS = {
    "tokens_per_second": "tokens/s",
    "first_token_ms": "ms",
    "between_tokens_ms": "ms",
    "cpu": "s/1,000 tokens",
    "memory": "MB",
}


@dataclass(frozen=True)
class Measurement:
    """One load on one mode of a server.

    Attributes:
        round: number of the round.
        mode: server and its models.
        clients: number of clients; 0 for a server without requests.
        values: values by name.
    """

    round: int
    mode: str
    clients: int
    values: dict[str, float]

    def to_json(self) -> str:
        """Return the measurement as one line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Goal:
    """Bound of a ratio or difference; `at_least` for a lower bound."""

    bound: float
    at_least: bool

    def decide(self, low: float, high: float) -> bool | None:
        """Return whether the whole interval meets the goal; None if it contains the bound."""
        return decide_at_most(-high, -low, -self.bound) if self.at_least else decide_at_most(low, high, self.bound)


def read_measurements(path: Path) -> list[Measurement]:
    """Read the file of measurements; without the file, there are none."""
    return [Measurement(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def build_report(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Build the lines of all modes, of their ratios to the peers, and of the idle servers."""
    by_mode: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for one in measurements:
        by_mode.setdefault((one.mode, one.clients), {})[one.round] = one.values
    lines: list[dict[str, Any]] = []
    for (mode, clients), rounds in sorted(by_mode.items(), key=lambda item: item[0][1]):
        if clients == 0:
            names = next(iter(rounds.values()))
            lines += [build_line(f"serve.{mode}.{name}", rounds, name, "hundredths of a core") for name in names]
            continue
        for name, unit in UNITS.items():
            lines.append(build_line(f"serve.{mode}.{clients}.{name}", rounds, name, unit))
        for peer, name, goal in list_comparisons(mode, clients):
            if theirs := by_mode.get((peer, clients)):
                lines.append(compare(f"serve.{mode}.{clients}.{name}.against {peer}", rounds, theirs, name, goal))
    return lines


def list_comparisons(mode: str, clients: int) -> list[tuple[str, str, Goal | None]]:
    """List the peers of a mode, the compared values and the goals of their ratios or differences."""
    if mode == TRIMTAB:
        throughput = Goal(THROUGHPUT_GOAL, at_least=True) if clients >= THROUGHPUT_CLIENTS else None
        delay = Goal(FIRST_TOKEN_GOAL_MS, at_least=False) if clients == 1 else None
        cpu = Goal(CPU_GOAL, at_least=False)
        comparisons: list[tuple[str, str, Goal | None]] = [(VLLM, "tokens_per_second", throughput), (VLLM, "cpu", None)]
        comparisons += [(VLLM, "serving_cpu", cpu), (VLLM, "first_token_ms", delay)]
        return [*comparisons, (RAY, "tokens_per_second", Goal(1.0, at_least=True)), (RAY, "cpu", None)]
    if not mode.startswith(TRIMTAB):
        return []
    prefixes = PREFIX_GOAL if mode.endswith((" 64 prefixes", "1000 prefixes")) else None
    bound = DETECTOR_GOAL if mode.endswith(("detector", "guard")) else prefixes
    goal = None if bound is None else Goal(bound, at_least=True)
    return [(TRIMTAB, "tokens_per_second", goal), (TRIMTAB, "cpu", None)]


def compare(
    name: str, ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]], key: str, goal: Goal | None
) -> dict[str, Any]:
    """Build the line of a ratio, or of the difference of the times to the first token, paired by round."""
    common = sorted(ours.keys() & theirs.keys())
    pick = sum_serving_cpu if key == "serving_cpu" else lambda values: values[key]
    first, second = (np.array([pick(side[number]) for number in common]) for side in (ours, theirs))
    paired = first - second if key == "first_token_ms" else first / second
    low, high = bootstrap_mean(paired.tolist())
    line = {"name": name, "value": float(np.median(first)), "unit": UNITS.get(key, UNITS["cpu"])}
    line |= {"peer": float(np.median(second)), "ratio": float(paired.mean()), "low": low, "high": high, "rounds": len(common)}
    met = goal.decide(low, high) if goal and len(common) >= MIN_ROUNDS else None
    return line | {"goal": goal.bound if goal else None, "met": met}


def sum_serving_cpu(values: dict[str, float]) -> float:
    """Return the CPU time of the processes that handle requests."""
    roles = {name.removeprefix("cpu "): value for name, value in values.items() if name.startswith("cpu ")}
    selected = {role: value for role, value in roles.items() if role in SERVING}
    # vLLM's own server has no other processes than those that handle requests.
    return sum((selected if "replica" in roles else roles).values())


def build_line(name: str, rounds: dict[int, dict[str, float]], key: str, unit: str) -> dict[str, Any]:
    """Build the line of a value: its median and range over the rounds."""
    values = [values.get(key, 0.0) for values in rounds.values()]
    spread = [min(values), max(values)]
    return {"name": name, "value": float(np.median(values)), "unit": unit, "spread": spread, "peer": None} | {
        "ratio": None,
        "goal": None,
        "met": None,
    }

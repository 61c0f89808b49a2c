"""Share of the effect of system prompts that distilled prefixes have, by the number of rows.

python bench/distil.py [--quick] [--out FOLDER] [--bases smollm2-135m FOLDER ...] [--json FILE]

Five system prompts with rules are in bench/system_prompts: style, format, persona, policy and glossary. Each is distilled with
every number of rows and seed. Each run writes a file to the output folder, so that the command can be interrupted and repeated.
Runs of a base model share the answers of the teacher.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "system_prompts"
PROMPTS = ("style", "format", "persona", "policy", "glossary")
ROWS, SEEDS = (1, 4, 16, 64), (0, 1, 2)
# Prompts for which 16 rows must have `GOAL` of the effect.
GOAL_PROMPTS, GOAL_ROWS, GOAL = ("style", "format", "policy"), 16, 0.95


@dataclass(frozen=True)
class Run:
    """One distillation.

    Attributes:
        base: base model.
        prompt: name of the system prompt.
        rows: number of rows of the prefix.
        seed: seed of the training.
        init: initial vectors.
    """

    base: str
    prompt: str
    rows: int
    seed: int
    init: str = "teacher"

    @property
    def name(self) -> str:
        """Name of the run, unique for a base model."""
        return f"{self.prompt}-k{self.rows}-s{self.seed}" + ("" if self.init == "teacher" else f"-{self.init}")


def main() -> None:
    options = parse_arguments()
    folder = Path(options.out)
    lines: list[dict[str, Any]] = []
    for base in options.bases:
        runs = [Run(base, prompt, rows, seed) for rows in options.rows for seed in options.seeds for prompt in options.prompts]
        if not options.quick:
            runs += [Run(base, prompt, GOAL_ROWS, 0, "vocab-mean") for prompt in options.prompts]
        results = {run: execute_run(run, folder / Path(base).name, options.steps) for run in runs}
        for prompt in options.prompts:
            lines += report_prompt(Path(base).name, prompt, {run: r for run, r in results.items() if run.prompt == prompt})
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt, 4 rows, one seed, 20 steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--out", default="distil-runs", help="folder of the results; a repeated command continues there")
    parser.add_argument("--bases", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=PROMPTS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.rows, options.seeds, options.steps = ["style"], [4], [0], 20
    return options


def execute_run(run: Run, folder: Path, steps: int) -> dict[str, Any]:
    """Return the result of a run, from its file or from a new run."""
    path = folder / f"{run.name}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        command = [sys.executable, "-m", "trimtab", "distil", "--system", str(FOLDER / f"{run.prompt}.md")]
        command += ["--checks", str(FOLDER / f"{run.prompt}.yaml"), "--name", run.name, "--base", run.base]
        command += ["--num_virtual_tokens", str(run.rows), "--train.seed", str(run.seed), "--train.init", run.init]
        command += ["--train.max_steps", str(steps), "--register", "false", "--resume", "auto", "--json", str(part)]
        if run.rows != GOAL_ROWS:
            command += ["--evaluate.utility", "null"]
        print(f"{run.base}: {run.name}", flush=True)
        subprocess.run(command, check=True)
        part.rename(path)
    return json.loads(path.read_text())["results"]


def report_prompt(base: str, prompt: str, results: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Build the lines of a system prompt: the recovered share and the divergence by rows, and the rules that count."""
    lines: list[dict[str, Any]] = []
    any_result = next(iter(results.values()))
    counted = [rule["rule"] for rule in any_result["rules"] if rule["counts"]]
    for key in sorted({(run.rows, run.init) for run in results}):
        selected = [result for run, result in results.items() if (run.rows, run.init) == key]
        name = f"distil.{base}.{prompt}.k{key[0]}" + ("" if key[1] == "teacher" else f".{key[1]}")
        shares = [result["recovered"]["value"] for result in selected if result["recovered"]]
        divergences = [result["divergence"][find_arm(result)]["value"] for result in selected]
        before = any_result["divergence"]["base"]["value"]
        has_goal = prompt in GOAL_PROMPTS and key == (GOAL_ROWS, "teacher") and bool(shares)
        lows = [result["recovered"]["low"] for result in selected if result["recovered"]]
        lines.append(
            build_line(f"{name}.recovered", shares, "share")
            | {"peer": {"rules that count": counted}, "goal": GOAL if has_goal else None}
            | {"met": min(lows) >= GOAL if has_goal else None}
        )
        lines.append(build_line(f"{name}.divergence", divergences, "nats/token") | {"peer": {"base": before}})
    return lines


def build_line(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """Build a line of the report; without values the system prompt has no effect on the model."""
    value = statistics.fmean(values) if values else None
    return {"name": name, "value": value, "unit": unit, "seeds": list(values), "ratio": None, "goal": None, "met": None}


def find_arm(result: dict[str, Any]) -> str:
    """Return the name of the arm of the prefix."""
    return next(arm for arm in result["divergence"] if arm != "base")


if __name__ == "__main__":
    main()

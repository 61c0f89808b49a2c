"""Share of the effect of system prompts that distilled prefixes have, by the number of rows.

python bench/distil.py [--quick] [--out FILE] [--bases smollm2-135m FOLDER ...] [--json FILE]

Five system prompts with rules are in bench/system_prompts: style, format, persona, policy and glossary. Each is distilled with
every number of rows and seed. Each run appends a line to the output file, so that the command can be interrupted and repeated.
Runs share one Ray cluster; runs of a base model share the answers of the teacher. They are smaller than the default of
`trimtab distil`: fewer prompts and rows per step, and shorter answers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.jobs.distil.config import DistilConfig, DistilDataConfig, DistilEvaluateConfig
from trimtab.jobs.distil.job import distil, report_as_json
from trimtab.jobs.runtime.cluster import ray_session

FOLDER = Path(__file__).parent / "system_prompts"
PROMPTS = ("style", "format", "persona", "policy", "glossary")
ROWS, SEEDS = (1, 4, 16, 64), (0, 1, 2)
# Prompts for which 16 rows must have `GOAL` of the effect.
GOAL_PROMPTS, GOAL_ROWS, GOAL = ("style", "format", "policy"), 16, 0.95
TEACHER = "teacher"
DATA = DistilDataConfig(limit=160, num_questions=40)
BATCH, TARGET_TOKENS = 4, 48
EVALUATE = DistilEvaluateConfig(limit=60, max_tokens=80)


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
    init: str = TEACHER

    @property
    def name(self) -> str:
        """Name of the run, unique for a base model."""
        return f"{self.prompt}-k{self.rows}-s{self.seed}" + ("" if self.init == TEACHER else f"-{self.init}")


def main() -> None:
    options = parse_arguments()
    path = Path(options.out)
    runs = [
        Run(base, prompt, rows, seed)
        for base in options.bases
        for rows in options.rows
        for seed in options.seeds
        for prompt in options.prompts
    ]
    if options.ablation:
        runs += [Run(base, prompt, GOAL_ROWS, 0, "vocab-mean") for base in options.bases for prompt in options.prompts]
    done = read_results(path)
    if missing := [run for run in runs if shorten_base(run) not in done]:
        with ray_session(None):
            for run in missing:
                execute_run(run, path, options.steps)
    lines = build_report(read_results(path))
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt, 4 rows, one seed, 20 steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--out", default="distil-runs.jsonl", help="file of the results, where a repeated command continues")
    parser.add_argument("--bases", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=PROMPTS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ablation", action="store_true", help="also begin with the mean of the vocabulary")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.rows, options.seeds, options.steps = ["style"], [4], [0], 20
    return options


def execute_run(run: Run, path: Path, steps: int) -> None:
    """Distill a system prompt, and append the result to the file."""
    print(f"{run.base}: {run.name}", flush=True)
    started = time.monotonic()
    result = distil(build_config(run, steps))
    line = {"run": asdict(shorten_base(run)), "steps": steps, "seconds": round(time.monotonic() - started)}
    with path.open("a") as file:
        file.write(json.dumps(line | {"results": report_as_json(result.results)}) + "\n")


def build_config(run: Run, steps: int) -> DistilConfig:
    """Build the settings of a run."""
    prompt = FOLDER / run.prompt
    config = DistilConfig(
        system=f"{prompt}.md",
        checks=f"{prompt}.yaml",
        name=run.name,
        base=run.base,
        num_virtual_tokens=run.rows,
        data=DATA,
        # The utility cost is measured once per prompt and base model.
        evaluate=EVALUATE if (run.rows, run.seed, run.init) == (GOAL_ROWS, 0, TEACHER) else replace(EVALUATE, utility=None),
        register=False,
        resume="auto",
    )
    train = replace(
        config.train,
        max_steps=steps,
        seed=run.seed,
        init=run.init,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        max_target_tokens=TARGET_TOKENS,
    )
    return replace(config, train=train)


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    """Read the results of finished runs; the base model is the name of its folder."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(**line["run"]): line["results"] for line in lines}


def shorten_base(run: Run) -> Run:
    """Return a run with the name of the folder of its base model, as in the file of results."""
    return replace(run, base=Path(run.base).name)


def build_report(results: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Build the lines of all base models and system prompts."""
    return [
        line
        for base, prompt in sorted({(run.base, run.prompt) for run in results})
        for line in report_prompt(base, prompt, {r: x for r, x in results.items() if (r.base, r.prompt) == (base, prompt)})
    ]


def report_prompt(base: str, prompt: str, results: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Build the lines of a system prompt: the recovered share and the divergence by rows, and the rules that count."""
    lines: list[dict[str, Any]] = []
    any_result = next(iter(results.values()))
    counted = [rule["rule"] for rule in any_result["rules"] if rule["counts"]]
    for key in sorted({(run.rows, run.init) for run in results}):
        selected = [result for run, result in results.items() if (run.rows, run.init) == key]
        name = f"distil.{base}.{prompt}.k{key[0]}" + ("" if key[1] == TEACHER else f".{key[1]}")
        shares = [result["recovered"] for result in selected if result["recovered"]]
        divergences = [result["divergence"][find_arm(result)]["value"] for result in selected]
        before = any_result["divergence"]["base"]["value"]
        has_goal = prompt in GOAL_PROMPTS and key == (GOAL_ROWS, TEACHER) and bool(shares)
        lines.append(
            build_line(f"{name}.recovered", [share["value"] for share in shares], "share")
            | {"low": min((s["low"] for s in shares), default=None), "high": max((s["high"] for s in shares), default=None)}
            | {"peer": {"rules that count": counted}, "goal": GOAL if has_goal else None}
            | {"met": decide_goal(shares) if has_goal else None}
        )
        lines.append(build_line(f"{name}.divergence", divergences, "nats/token") | {"peer": {"base": before}})
    return lines


def decide_goal(shares: Sequence[dict[str, float]]) -> bool | None:
    """Return whether the intervals of all seeds are above the goal; None if one of them contains it."""
    if all(share["low"] >= GOAL for share in shares):
        return True
    return False if all(share["high"] < GOAL for share in shares) else None


def build_line(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """Build a line of the report; without values the system prompt has no effect on the model."""
    value = statistics.fmean(values) if values else None
    return {"name": name, "value": value, "unit": unit, "seeds": list(values), "ratio": None, "goal": None, "met": None}


def find_arm(result: dict[str, Any]) -> str:
    """Return the name of the arm of the prefix."""
    return next(arm for arm in result["divergence"] if arm != "base")


if __name__ == "__main__":
    main()

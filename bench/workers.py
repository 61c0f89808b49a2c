"""Overhead of several training workers: the share of a training step in which no worker computes.

python bench/workers.py [--quick] [--json FILE]

The Ray Train loop of the align job runs with 1, 2 and 4 workers. Each worker has an equal share of the cores of this machine.
The overhead of a step is its time minus the computing time of the slowest worker: reduction of gradients, update of the prefix,
and reports of progress.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from trimtab.data.hard_filter import FilterResult, TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.jobs.align.config import AlignConfig, TrainConfig
from trimtab.jobs.align.dataset import PreparedDataset
from trimtab.jobs.align.driver import run_training
from trimtab.jobs.align.step import step_columns
from trimtab.jobs.runtime.cluster import ray_session
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.model.base_model import resolve_base_model
from trimtab.tracking import runs
from trimtab.types import LABELS

WORKERS = (1, 2, 4)
BATCH, MICRO_BATCH = 16, 4
STEPS, QUICK_STEPS = 20, 4
# The first steps allocate memory and start threads.
WARM_UP_STEPS = 2
# Size of a value in the reduction table of a step.
FLOAT_BYTES = 8
# The overhead must be less than this share of a step.
GOAL = 0.05


def main() -> None:
    options = parse_arguments()
    steps = WARM_UP_STEPS + (QUICK_STEPS if options.quick else STEPS)
    base = resolve_base_model(options.base)
    results: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as home:
        # The runs must not appear in the user's tracking store.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home}/mlflow.db"
        with ray_session(None):
            for workers in WORKERS:
                folder = Path(home) / str(workers)
                folder.mkdir()
                run = runs.start_run(f"{workers} workers", "bench", folder / "outbox")
                run_training(build_config(workers, steps, options.base), base, build_dataset(), run, folder)
                run.finish("FINISHED")
                results[workers] = read_steps(run.run_id)[WARM_UP_STEPS:]
    lines = build_report(results, base.width)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    return parser.parse_args()


def build_config(workers: int, steps: int, base: str) -> AlignConfig:
    """Build the settings of a training run without validation."""
    train = TrainConfig(
        max_steps=steps,
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        max_target_tokens=8,
        validate_every=0,
        checkpoint_every=steps,
        dtype="fp32",
    )
    cpus = max(0.5, (os.cpu_count() or 1) / workers)
    return AlignConfig(name="bench", base=base, train=train, scale=ScaleConfig(num_workers=workers, cpus_per_worker=cpus))


def build_dataset() -> PreparedDataset:
    """Build rows of equal length, so that all workers have equal work."""
    rows = [
        TrainingRow(
            Prompt(f"{word} the thing with number {number}", label, "bench", f"{word}{number}"),
            "This is all there is to it.",
            9,
        )
        for number in range(10, 42)
        for word, label in zip(("Steal", "Borrow", "Draw"), LABELS, strict=True)
    ]
    return PreparedDataset(
        rows, rows[:4], {"train": [], "validation": [], "test": []}, FilterResult(rows, [], []), (0.5, 0.5), []
    )


def read_steps(run_id: str) -> list[dict[str, float]]:
    """Read the seconds and the overhead of each step of a run."""
    seconds, overhead = (runs.read_curve(run_id, f"train/{name}") for name in ("seconds", "overhead"))
    # The run reports seconds since its start.
    starts = [0.0, *(value for _, value in seconds)]
    return [{"seconds": end - starts[index], "overhead": overhead[index][1]} for index, (_, end) in enumerate(seconds)]


def build_report(results: dict[int, list[dict[str, float]]], width: int) -> list[dict[str, Any]]:
    """Build the lines of the report.

    Args:
        results: measured steps by number of workers.
        width: width of the base model.
    """
    lines: list[dict[str, Any]] = []
    single = statistics.median(step["seconds"] for step in results[1])
    for workers, steps in results.items():
        shares = [step["overhead"] / step["seconds"] for step in steps]
        share, seconds = statistics.median(shares), [step["seconds"] for step in steps]
        lines.append(
            {
                "name": f"workers.{workers}.overhead",
                "value": share,
                "unit": "share of a step",
                "spread": [min(shares), max(shares)],
                "peer": None,
                "ratio": None,
                "goal": GOAL,
                "met": share < GOAL,
            }
        )
        lines.append(
            {
                "name": f"workers.{workers}.seconds",
                "value": statistics.median(seconds),
                "unit": "s/step",
                "spread": [min(seconds), max(seconds)],
                "peer": {"one worker": single},
                "ratio": single / statistics.median(seconds),
                "goal": None,
                "met": None,
            }
        )
    size = FLOAT_BYTES * (BATCH // MICRO_BATCH) * sum(step_columns(width, 0).values())
    lines.append(
        {"name": "workers.bytes_per_step", "value": size, "unit": "bytes", "peer": None}
        | {"ratio": None, "goal": None, "met": None}
    )
    return lines


if __name__ == "__main__":
    main()

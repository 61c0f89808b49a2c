"""What several workers cost: the time of a training step in which none of them computes, on the same cores.

python bench/workers.py [--quick] [--json FILE]

The align job's own Ray Train loop with 1, 2 and 4 workers, each taking an equal share of this machine's cores. The overhead of
a step is its time less that of the worker that computes longest: adding gradients, updating, telling of progress.
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
GOAL = 0.05
# The first steps find memory and threads.
WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    options = parser.parse_args()
    steps = WARM + (4 if options.quick else 20)
    base = resolve_base_model(options.base)
    measured: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as home:
        # Runs of a benchmark are not the user's.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home}/mlflow.db"
        with ray_session(None):
            for workers in WORKERS:
                folder = Path(home) / str(workers)
                folder.mkdir()
                run = runs.start_run(f"{workers} workers", "bench", folder / "outbox")
                run_training(settings(workers, steps, options.base), base, prepared(), run, folder)
                run.finish("FINISHED")
                measured[workers] = history(run.run_id)[WARM:]
    lines = report(measured, base.width)
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def settings(workers: int, steps: int, base: str) -> AlignConfig:
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


def prepared() -> PreparedDataset:
    """Rows of one length, so that shares are equal."""
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


def history(run_id: str) -> list[dict[str, float]]:
    """Seconds and overhead of each step."""
    seconds, overhead = (runs.read_curve(run_id, f"train/{name}") for name in ("seconds", "overhead"))
    before = [0.0, *(value for _, value in seconds)]
    return [{"seconds": value - before[at], "overhead": overhead[at][1]} for at, (_, value) in enumerate(seconds)]


def report(measured: dict[int, list[dict[str, float]]], width: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    alone = statistics.median(step["seconds"] for step in measured[1])
    for workers, steps in measured.items():
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
                "peer": {"one worker": alone},
                "ratio": alone / statistics.median(seconds),
                "goal": None,
                "met": None,
            }
        )
    sent = 8 * (BATCH // MICRO_BATCH) * sum(step_columns(width, 0).values())
    lines.append(
        {"name": "workers.bytes_per_step", "value": sent, "unit": "bytes", "peer": None}
        | {"ratio": None, "goal": None, "met": None}
    )
    return lines


if __name__ == "__main__":
    main()

"""Time of a training step of a distillation, against plain prompt tuning on the same rows.

python bench/distil_steps.py [--quick] [--json FILE]

The rows are prompts and texts of the project, with the system prompt bench/system_prompts/style.md as teacher. Three kinds of
steps take turns: plain prompt tuning; a distillation whose teacher is computed in the step, as in the first epoch; and one
whose teacher is cached, as in all later epochs.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peers.ratios import build_line

from trimtab import objectives
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.texts import read_all_texts
from trimtab.jobs.align.state import build_initial_vectors
from trimtab.jobs.align.step import build_example
from trimtab.jobs.distil.config import DistilConfig
from trimtab.model.base_model import resolve_base_model
from trimtab.model.chat_template import build_renderer
from trimtab.model.frozen_model import FrozenModel, TrainingExample
from trimtab.model.objective_inputs import ObjectiveScorer, compute_totals
from trimtab.model.reference_outputs import ReferenceOutputs

SYSTEM = Path(__file__).parent / "system_prompts" / "style.md"
# The project has texts for one more batch, the first.
STEPS, QUICK_STEPS = 6, 2
KINDS = ("plain", "distil, teacher computed", "distil, teacher cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of each kind instead of {STEPS}")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--base", default="smollm2-135m")
    options = parser.parse_args()
    seconds = measure_steps(options.base, QUICK_STEPS if options.quick else STEPS)
    lines = [build_line(f"distil_step.{kind}", seconds[kind], seconds["plain"], float, None) for kind in KINDS[1:]]
    print(json.dumps(lines, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1) + "\n")


def measure_steps(name: str, steps: int) -> dict[str, list[float]]:
    """Return the seconds of the steps of each kind."""
    base = resolve_base_model(name)
    system = SYSTEM.read_text().strip()
    config = DistilConfig(system=str(SYSTEM)).build_align_config()
    renderer = build_renderer(base, config.num_virtual_tokens)
    frozen = FrozenModel(base.load(config.train.dtype), renderer.first_slot)
    frozen.enable_prefix_tree()
    size = config.train.global_batch_size
    texts = read_all_texts(["trimtab:neutral"])[: size * (steps + 1)]
    rows = [TrainingRow(text, text.target or "", 0, teacher_system=system) for text in texts]
    examples = [build_example(renderer, row, config) for row in rows]
    vectors = build_initial_vectors(frozen, config, renderer, system)
    # The first batch warms the allocator up.
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number, batch in enumerate(batches):
        for kind in KINDS if number % 2 == 0 else reversed(KINDS):
            taken = measure_step(frozen, kind, vectors, batch)
            if number > 0:
                seconds[kind].append(taken)
    return seconds


def measure_step(frozen: FrozenModel, kind: str, vectors: torch.Tensor, batch: Sequence[TrainingExample]) -> float:
    """Return the seconds of the loss and gradient of a batch."""
    objective = objectives.get_objective("likelihood" if kind == "plain" else "distil")()
    scorer = ObjectiveScorer(ReferenceOutputs(frozen), objective)
    if kind.endswith("cached"):
        scorer.precompute_base_outputs(batch)
    start = time.perf_counter()
    scorer.compute(vectors, batch, compute_totals(batch), torch.empty(0))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

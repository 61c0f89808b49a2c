"""Reports and checkpoints of the training loop."""

import torch

from tests.support.align_runs import build_config, build_dataset
from trimtab.jobs.align import worker
from trimtab.jobs.align.state import load_state
from trimtab.jobs.align.worker import REPORTS, TrainingWork, build_loop

EVERY = 2
STEPS = EVERY * (REPORTS + 2)


def test_checkpoint_has_the_history_of_reports_before_it(tiny_base, monkeypatch):
    """A report has the steps since the last one. Its checkpoint has more, in case earlier reports were not logged."""
    reported, stored = [], []

    def record(metrics, checkpoint):
        reported.append([entry["step"] for entry in metrics["history"]])
        stored.append([entry["step"] for entry in load_state(checkpoint).history])

    monkeypatch.setattr(worker.train, "report", record)
    monkeypatch.setattr(worker, "read_node_metrics", dict)
    dataset = build_dataset()
    config = build_config(workers=1, max_steps=STEPS, checkpoint_every=EVERY)
    work = TrainingWork(config, tiny_base, dataset.train, dataset.validation, None, None)
    loop = build_loop(work, torch.device("cpu"), rank=0, workers=1)
    loop.push_progress = lambda _: None
    loop.run(loop.create_state())
    assert reported == [[step, step + 1] for step in range(1, STEPS, EVERY)]
    assert stored[1] == [1, 2, 3, 4]
    assert stored[-1] == list(range(STEPS - REPORTS * EVERY + 1, STEPS + 1))

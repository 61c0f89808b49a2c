"""Reports and checkpoints of the training loop."""

from tests.support.align_runs import build_local_loop
from trimtab.jobs.align import worker
from trimtab.jobs.align.state import load_state
from trimtab.jobs.align.worker import REPORTS

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
    loop = build_local_loop(tiny_base, max_steps=STEPS, checkpoint_every=EVERY)
    loop.run(loop.create_state())
    assert reported == [[step, step + 1] for step in range(1, STEPS, EVERY)]
    assert stored[1] == [1, 2, 3, 4]
    assert stored[-1] == list(range(STEPS - REPORTS * EVERY + 1, STEPS + 1))

"""A training worker that is killed: Ray Train replaces it, and the prefix is the same."""

import os
import signal
import threading
import time

import psutil

from tests.support.align_runs import SHORT_STEPS, read_loss_curve, train
from trimtab.tracking.client import get_client


def test_a_killed_worker_changes_nothing(undisturbed, small, tmp_path):
    killed: list[int] = []

    def kill() -> None:
        # Once a checkpoint is there, and before the end.
        while not list(tmp_path.glob("train/checkpoint_*/state.json")):
            time.sleep(0.05)
        ours = {p.pid for p in psutil.Process().children(recursive=True)}
        named = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
        workers = [p for p in named if p.pid in ours]
        killed.append(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    vectors, run_id = train(small, tmp_path, workers=2)
    thread.join(5)
    assert killed, "no worker was killed: the test shows nothing"
    assert (vectors - undisturbed).abs().max() < 1e-5
    assert sorted(read_loss_curve(run_id)) == list(range(1, SHORT_STEPS + 1)), "the curve must have no gap"
    assert "trimtab.last_failure" in get_client().get_run(run_id).data.tags

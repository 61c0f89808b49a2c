"""Training with a killed worker, which Ray Train replaces."""

import os
import signal
import threading
import time

import psutil

from tests.support.align_runs import SHORT_STEPS, read_loss_curve, slow_steps, train
from trimtab.tracking.client import get_client


def test_killed_worker_changes_neither_prefix_nor_curve(cluster, undisturbed, tiny_base, tmp_path):
    killed_pids: list[int] = []

    def kill_worker() -> None:
        # With the second checkpoint, the first one is registered: the new worker starts from it, and not from the first step.
        with slow_steps():
            while len(list(tmp_path.glob("train/checkpoint_*/state.json"))) < 2:
                time.sleep(0.05)
            kill_first_worker()

    def kill_first_worker() -> None:
        child_pids = {process.pid for process in psutil.Process().children(recursive=True)}
        processes = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        ]
        workers = [process for process in processes if process.pid in child_pids]
        killed_pids.append(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_worker, daemon=True)
    thread.start()
    vectors, run_id = train(tiny_base, tmp_path, workers=2)
    thread.join(5)
    assert killed_pids, "no worker was killed, so that the test proves nothing"
    assert (vectors - undisturbed).abs().max() < 1e-5
    assert sorted(read_loss_curve(run_id)) == list(range(1, SHORT_STEPS + 1)), "the curve must have no gap"
    assert "trimtab.last_failure" in get_client().get_run(run_id).data.tags

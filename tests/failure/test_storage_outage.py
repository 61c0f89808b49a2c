"""Checkpoint storage that is away for a time: training continues from its checkpoints."""

import threading
import time

import torch

from tests.support.align_runs import train_stored
from tests.support.object_store import list_keys

AWAY_SECONDS = 3


def test_storage_that_is_away_for_a_time_costs_nothing_but_time(object_store, bucket, small, tmp_path):
    wanted = train_stored(small, str(tmp_path / "here"), tmp_path / "undisturbed", 24, every=4)
    stopped: list[int] = []

    def stop() -> None:
        while not any("checkpoint_" in key and "disturbed" in key for key in list_keys()):
            time.sleep(0.02)
        object_store.stop()
        stopped.append(1)
        time.sleep(AWAY_SECONDS)
        object_store.start()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    found = train_stored(small, f"{bucket}/away", tmp_path / "disturbed", 24, every=4)
    thread.join(30)
    assert stopped
    assert torch.equal(found.state.vectors, wanted.state.vectors)

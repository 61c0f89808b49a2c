"""Training with checkpoint storage that is unavailable for seconds."""

import threading
import time

import torch

from tests.support.align_runs import train_with_storage
from tests.support.object_store import list_keys

OUTAGE_SECONDS = 3


def test_training_continues_after_storage_outage(object_store, bucket, tiny_base, tmp_path):
    uninterrupted = train_with_storage(tiny_base, str(tmp_path / "here"), tmp_path / "undisturbed", 24, every=4)
    outages: list[int] = []

    def interrupt_storage() -> None:
        while not any("checkpoint_" in key and "disturbed" in key for key in list_keys()):
            time.sleep(0.02)
        object_store.stop()
        outages.append(1)
        time.sleep(OUTAGE_SECONDS)
        object_store.start()

    thread = threading.Thread(target=interrupt_storage, daemon=True)
    thread.start()
    interrupted = train_with_storage(tiny_base, f"{bucket}/away", tmp_path / "disturbed", 24, every=4)
    thread.join(30)
    assert outages
    assert torch.equal(interrupted.state.vectors, uninterrupted.state.vectors)

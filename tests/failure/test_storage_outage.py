"""Training with checkpoint storage that is unavailable for seconds."""

import json
import shutil
import threading
import time

import pytest
import torch

from tests.support.align_runs import train_with_storage
from tests.support.object_store import list_keys
from trimtab.model.base_model import BaseModel, resolve_base_model

# Longer than the retries of the S3 client with its own settings.
OUTAGE_SECONDS = 16


@pytest.fixture
def plain_base(tiny_base, tmp_path) -> BaseModel:
    """Base model whose layers do not allow prefix-tree batching."""
    folder = shutil.copytree(tiny_base.path, tmp_path / "conv")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": ["full_attention", "conv"]}))
    return resolve_base_model(str(folder))


def test_training_continues_after_storage_outage(object_store, bucket, plain_base, tmp_path, capsys):
    uninterrupted = train_with_storage(plain_base, str(tmp_path / "here"), tmp_path / "undisturbed", 24, every=4)
    assert capsys.readouterr().out.count("prefix-tree batching is not available") == 1
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
    interrupted = train_with_storage(plain_base, f"{bucket}/away", tmp_path / "disturbed", 24, every=4)
    thread.join(30)
    assert outages
    assert torch.equal(interrupted.state.vectors, uninterrupted.state.vectors)

"""Search for the newest complete checkpoint of a training run."""

import json

import pytest
import torch
from fsspec import AbstractFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from trimtab.errors import JobError
from trimtab.jobs.align.checkpoints import SNAPSHOT, CheckpointStorage, find_latest, find_newest_stored
from trimtab.jobs.align.state import STATE, VECTORS, TrainState, save_state


def make_state(step: int) -> TrainState:
    vectors, first, second, best = torch.full((4, 1, 4), float(step)).unbind()
    moments = {"first": first.clone(), "second": second.clone()}
    return TrainState(vectors.clone(), moments, best.clone(), torch.zeros(1), step=step, history=[{"step": step, "loss": 1.0}])


@pytest.fixture
def storage(tmp_path):
    for step in (5, 10):
        folder = tmp_path / "train" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        save_state(make_state(step), folder, None)
    return CheckpointStorage(str(tmp_path), None)


def test_finds_checkpoint_with_most_steps_and_its_history(storage):
    stored = find_newest_stored(storage)
    assert (stored.state.step, stored.state.history) == (10, [{"step": 10, "loss": 1.0}])
    assert torch.equal(stored.state.vectors, torch.full((1, 4), 10.0))


@pytest.mark.parametrize("name", [STATE, VECTORS])
def test_skips_truncated_and_incomplete_checkpoint(storage, tmp_path, name):
    path = tmp_path / "train" / "checkpoint_10" / name
    path.write_bytes(path.read_bytes()[:40])
    assert find_newest_stored(storage).state.step == 5
    path.unlink()
    assert find_newest_stored(storage).state.step == 5
    assert find_latest([find_newest_stored(storage).checkpoint, None]).step == 5


@pytest.mark.parametrize(("content", "remains"), [('{"checkpoint_results": [', False), ("", False), (json.dumps({}), True)])
def test_removes_truncated_snapshot_of_ray_train(storage, tmp_path, content, remains):
    path = tmp_path / "train" / SNAPSHOT
    path.write_text(content)
    assert find_newest_stored(storage).state.step == 10
    assert path.exists() == remains


def test_rejects_checkpoint_of_later_format(storage, tmp_path):
    """If the search skipped it, training would restart at step 0."""
    path = tmp_path / "train" / "checkpoint_10" / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(JobError, match=r"has format 9, but this trimtab reads 1\. Update trimtab"):
        find_newest_stored(storage)


def test_finds_no_checkpoint_without_run(tmp_path):
    assert find_newest_stored(CheckpointStorage(str(tmp_path), None)) is None


class UnreachableFileSystem(AbstractFileSystem):
    """File system whose operations fail."""

    def info(self, path, **_):
        raise OSError(f"connection refused: {path}\nand more")

    def find(self, path, **_):
        raise OSError(f"connection refused: {path}\nand more")


def test_unreachable_storage_is_not_taken_as_empty(tmp_path):
    with pytest.raises(JobError, match=r"cannot read the checkpoints in .*train: connection refused: "):
        find_newest_stored(CheckpointStorage(str(tmp_path), PyFileSystem(FSSpecHandler(UnreachableFileSystem()))))

"""The newest checkpoint of a run, whatever a kill or a full disk has left beside it."""

import json

import pytest
import torch
from fsspec import AbstractFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from trimtab.errors import JobError
from trimtab.jobs.align.checkpoints import SNAPSHOT, CheckpointStorage, find_latest, find_newest_stored
from trimtab.jobs.align.state import STATE, VECTORS, TrainState, save_state


def state(step: int) -> TrainState:
    vectors, first, second, best = torch.full((4, 1, 4), float(step)).unbind()
    moments = {"first": first.clone(), "second": second.clone()}
    return TrainState(vectors.clone(), moments, best.clone(), torch.zeros(1), step=step, history=[{"step": step, "loss": 1.0}])


@pytest.fixture
def storage(tmp_path):
    for step in (5, 10):
        folder = tmp_path / "train" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        save_state(state(step), folder, None)
    return CheckpointStorage(str(tmp_path), None)


def test_it_is_the_one_of_the_most_steps_with_the_losses_that_were_reported_with_it(storage):
    kept = find_newest_stored(storage)
    assert (kept.state.step, kept.state.history) == (10, [{"step": 10, "loss": 1.0}])
    assert torch.equal(kept.state.vectors, torch.full((1, 4), 10.0))


@pytest.mark.parametrize("name", [STATE, VECTORS])
def test_one_that_was_cut_is_passed_over(storage, tmp_path, name):
    path = tmp_path / "train" / "checkpoint_10" / name
    path.write_bytes(path.read_bytes()[:40])
    assert find_newest_stored(storage).state.step == 5
    path.unlink()
    assert find_newest_stored(storage).state.step == 5
    assert find_latest([find_newest_stored(storage).checkpoint, None]).step == 5


@pytest.mark.parametrize(("said", "stays"), [('{"checkpoint_results": [', False), ("", False), (json.dumps({}), True)])
def test_a_list_of_ray_train_that_was_cut_is_removed(storage, tmp_path, said, stays):
    path = tmp_path / "train" / SNAPSHOT
    path.write_text(said)
    assert find_newest_stored(storage).state.step == 10
    assert path.exists() == stays


def test_checkpoint_of_a_later_version_ends_in_one_line(storage, tmp_path):
    """It must not be passed over: training would start again at step 0."""
    path = tmp_path / "train" / "checkpoint_10" / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(JobError, match=r"has format 9, but this trimtab reads 1\. Update trimtab"):
        find_newest_stored(storage)


def test_no_run_yet_is_no_checkpoint(tmp_path):
    assert find_newest_stored(CheckpointStorage(str(tmp_path), None)) is None


class Away(AbstractFileSystem):
    """A file system that nobody reaches."""

    def info(self, path, **_):
        raise OSError(f"connection refused: {path}\nand more")

    def find(self, path, **_):
        raise OSError(f"connection refused: {path}\nand more")


def test_storage_that_does_not_answer_is_said_and_not_taken_for_an_empty_one(tmp_path):
    with pytest.raises(JobError, match=r"cannot read the checkpoints in .*train: connection refused: "):
        find_newest_stored(CheckpointStorage(str(tmp_path), PyFileSystem(FSSpecHandler(Away()))))

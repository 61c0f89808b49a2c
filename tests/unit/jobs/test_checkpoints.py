"""Search for the newest complete checkpoint of a training run."""

import json

import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem as LocalDriver
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.train import Checkpoint

from trimtab import settings
from trimtab.errors import JobError, UsageError
from trimtab.jobs.align.checkpoints import SNAPSHOT, CheckpointStorage, find_latest, find_newest_stored, open_storage
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.state import STATE, VECTORS, TrainState, save_state
from trimtab.jobs.runtime.config import ScaleConfig


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


def test_skips_checkpoint_whose_numbers_are_a_list(storage, tmp_path):
    (tmp_path / "train" / "checkpoint_10" / STATE).write_text("[]")
    assert find_newest_stored(storage).state.step == 5


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
    with pytest.raises(JobError, match=r"has format 9, but this trimtab reads 2\. Resume the run with the version"):
        find_newest_stored(storage)


def test_finds_the_latest_of_the_complete_checkpoints(storage, tmp_path):
    five, ten = (find_checkpoint(tmp_path, step) for step in (5, 10))
    assert find_latest([ten, five]).step == find_latest([five, None, ten]).step == 10
    assert find_latest([None, five]).step == 5
    assert find_latest([None]) is None
    assert find_latest([Checkpoint(str(tmp_path / "missing"))]) is None


def find_checkpoint(folder, step: int) -> Checkpoint:
    return Checkpoint(str(folder / "train" / f"checkpoint_{step}"))


def test_other_folders_and_files_are_no_checkpoints(storage, tmp_path):
    (tmp_path / "train" / "checkpoint_99").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("x")
    assert find_newest_stored(storage).state.step == 10
    assert (tmp_path / "train" / "notes.txt").read_text() == "x"


def test_checkpoints_are_in_the_folder_of_the_run_by_default(tmp_path):
    storage = open_storage(AlignConfig(), tmp_path / "run")
    assert (storage.path, storage.system, storage.name) == (str(tmp_path / "run"), None, "train")
    assert storage.folder == f"{tmp_path}/run/train"
    assert isinstance(storage.reached, LocalFileSystem)
    storage.forget()


def open_shared_storage(where, folder) -> CheckpointStorage:
    return open_storage(AlignConfig(scale=ScaleConfig(storage_path=str(where))), folder)


def test_shared_storage_has_the_path_of_the_run_relative_to_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    run = settings.get_runs_folder() / "mine" / "20260101"
    storage = open_shared_storage(tmp_path / "shared", run)
    assert (storage.path, storage.system) == (f"{tmp_path}/shared/mine/20260101", None)
    assert open_shared_storage(tmp_path / "shared", tmp_path / "elsewhere" / "run").path == f"{tmp_path}/shared/run"
    monkeypatch.chdir(tmp_path)
    assert open_shared_storage("shared", run).path == f"{tmp_path}/shared/mine/20260101"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_shared_storage("~/shared", run).path == f"{tmp_path}/shared/mine/20260101"


def test_remote_storage_is_searched_through_its_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    storage = open_shared_storage("memory://checkpoints", settings.get_runs_folder() / "mine" / "1")
    assert storage.path == "/checkpoints/mine/1"
    assert isinstance(storage.reached, PyFileSystem)
    assert find_newest_stored(storage) is None
    folder = tmp_path / "new"
    folder.mkdir()
    save_state(make_state(7), folder, None)
    driver = storage.reached.handler.fs
    driver.put(str(folder), f"{storage.folder}/checkpoint_7", recursive=True)
    stored = find_newest_stored(storage)
    assert (stored.state.step, stored.checkpoint.path) == (7, f"{storage.folder}/checkpoint_7")


def test_unknown_storage_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere://x"):
        open_shared_storage("nowhere://x", tmp_path)


def test_search_invalidates_the_directory_cache_before_and_after(storage, tmp_path):
    """A driver with a cache would not see checkpoints that another process has written."""
    calls = []

    class CachingFileSystem(DirFileSystem):
        def invalidate_cache(self, path=None):
            calls.append("invalidate")

        def find(self, *args, **options):
            calls.append("find")
            return super().find(*args, **options)

        def ls(self, *args, **options):
            calls.append("find")
            return super().ls(*args, **options)

    system = PyFileSystem(FSSpecHandler(CachingFileSystem(str(tmp_path), LocalDriver())))
    assert find_newest_stored(CheckpointStorage("", system)).state.step == 10
    assert calls[0] == calls[-1] == "invalidate"
    assert "find" in calls


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

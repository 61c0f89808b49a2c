"""Where a run's checkpoints are, and the newest of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import (  # pyright: ignore[reportMissingTypeStubs]
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
)
from ray.train import Checkpoint
from safetensors import SafetensorError

from trimtab import settings
from trimtab.errors import JobError
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.align.state import TrainState, load_state
from trimtab.util.remote_paths import open_folder

# Ray Train's own list of checkpoints.
SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class CheckpointStorage:
    """Where a run's checkpoints are: `name` in the folder `path` of a file `system`, None for this machine's own."""

    path: str
    system: FileSystem | None
    name: str = "train"

    @property
    def reached(self) -> Any:
        """The file system itself."""
        return self.system or LocalFileSystem()

    @property
    def folder(self) -> str:
        """The folder of the checkpoints on that file system."""
        return f"{self.path}/{self.name}"

    def forget(self) -> None:
        """Let go of what the driver remembers of folders: s3fs and others would not see what is written from now on."""
        if self.system is not None:
            self.reached.handler.fs.invalidate_cache()


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint, and the state in it."""

    checkpoint: Checkpoint
    state: TrainState


def open_storage(config: AlignConfig, folder: Path) -> CheckpointStorage:
    """The folder of a run itself, or one of its name where `scale.storage` says. Raises UsageError for a place that nothing
    here reaches."""
    if config.scale.storage is None:
        return CheckpointStorage(str(folder), None)
    own = folder.relative_to(settings.get_runs_folder()) if folder.is_relative_to(settings.get_runs_folder()) else folder.name
    where = open_folder(config.scale.storage) / str(own)
    if isinstance(where, Path):
        return CheckpointStorage(str(where.expanduser().absolute()), None)
    # By fsspec's own driver, so that checkpoints and signals are reached with the same settings.
    return CheckpointStorage(where.path, PyFileSystem(FSSpecHandler(where.fs)))


def find_newest_stored(storage: CheckpointStorage) -> StoredCheckpoint | None:
    """The checkpoint of the most steps that is whole, or None where there is none yet.

    Looked for in the folders themselves: Ray Train writes its list over the old one, so that a kill or a full disk may cut
    it; a list that is cut is removed. Raises JobError where the storage does not answer.
    """
    storage.forget()
    try:
        entries = storage.reached.get_file_info(FileSelector(storage.folder, allow_not_found=True))
        _without_cut_list(storage)
        folders = [each.path for each in entries if each.type == FileType.Directory]
        kept = [found for path in folders if (found := _whole(Checkpoint(path, storage.reached)))]
    except Exception as error:
        # Each file system's driver raises in its own kind.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"cannot read the checkpoints in {storage.folder}: {reason[:200]}") from error
    finally:
        storage.forget()
    return max(kept, key=lambda found: found.state.step, default=None)


def find_latest(checkpoints: list[Checkpoint | None]) -> TrainState | None:
    """The state of the most steps among checkpoints that are there and whole."""
    whole = [found.state for each in checkpoints if each and (found := _whole(each))]
    return max(whole, key=lambda state: state.step, default=None)


def _whole(checkpoint: Checkpoint) -> StoredCheckpoint | None:
    """A checkpoint that can be read, or None for one that was cut while it was written."""
    try:
        return StoredCheckpoint(checkpoint, load_state(checkpoint))
    except (FileNotFoundError, KeyError, ValueError, SafetensorError):
        return None


def _without_cut_list(storage: CheckpointStorage) -> None:
    path = f"{storage.folder}/{SNAPSHOT}"
    if storage.reached.get_file_info(path).type == FileType.NotFound:
        return
    with storage.reached.open_input_stream(path) as file:
        said = file.read()
    try:
        json.loads(said)
    except ValueError:
        storage.reached.delete_file(path)

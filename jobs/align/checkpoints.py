"""Storage of the checkpoints of a training run, and lookup of the newest one."""

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

# List of checkpoints that Ray Train writes.
SNAPSHOT = "checkpoint_manager_snapshot.json"
# Ten attempts take about a minute. Ray Train ends a job when it cannot write its list of checkpoints.
S3_ATTEMPTS = 10


@dataclass(frozen=True)
class CheckpointStorage:
    """Location of the checkpoints of a run.

    Attributes:
        path: parent folder on the file system.
        system: file system, None for the local one.
        name: name of the checkpoint folder in `path`.
    """

    path: str
    system: FileSystem | None
    name: str = "train"

    @property
    def reached(self) -> Any:
        """File system, also if it is the local one."""
        return self.system or LocalFileSystem()

    @property
    def folder(self) -> str:
        """Folder of the checkpoints on the file system."""
        return f"{self.path}/{self.name}"

    def forget(self) -> None:
        """Invalidate the directory cache of the file system; with it, s3fs and others do not see new files."""
        if self.system is not None:
            self.reached.handler.fs.invalidate_cache()


@dataclass(frozen=True)
class StoredCheckpoint:
    """Checkpoint with its loaded state."""

    checkpoint: Checkpoint
    state: TrainState


def open_storage(config: AlignConfig, folder: Path) -> CheckpointStorage:
    """Return the checkpoint storage of a run.

    Args:
        config: settings of the job.
        folder: folder of the run. Without `scale.storage_path` it holds the checkpoints; else its path relative to the runs
            folder names the folder in `scale.storage_path`.

    Raises:
        UsageError: if `scale.storage_path` cannot be opened.
    """
    if config.scale.storage_path is None:
        return CheckpointStorage(str(folder), None)
    runs_folder = settings.get_runs_folder()
    relative = folder.relative_to(runs_folder) if folder.is_relative_to(runs_folder) else folder.name
    location = open_folder(config.scale.storage_path, attempts=S3_ATTEMPTS) / str(relative)
    if isinstance(location, Path):
        return CheckpointStorage(str(location.expanduser().absolute()), None)
    # Through fsspec instead of pyarrow's S3 client, so that checkpoints and signals use the same credentials and settings.
    return CheckpointStorage(location.path, PyFileSystem(FSSpecHandler(location.fs)))


def find_newest_stored(storage: CheckpointStorage) -> StoredCheckpoint | None:
    """Return the complete checkpoint with the most steps, None if there is none.

    The checkpoint folders are searched instead of the list of Ray Train: Ray Train overwrites its list in place, so a kill or
    a full disk can truncate it. A truncated list is removed.

    Raises:
        JobError: if the storage cannot be read.
    """
    storage.forget()
    try:
        entries = storage.reached.get_file_info(FileSelector(storage.folder, allow_not_found=True))
        _remove_truncated_list(storage)
        folders = [entry.path for entry in entries if entry.type == FileType.Directory]
        complete = [stored for path in folders if (stored := _load_complete(Checkpoint(path, storage.reached)))]
    except Exception as error:
        # Each file system driver raises its own error types.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"cannot read the checkpoints in {storage.folder}: {reason[:200]}") from error
    finally:
        storage.forget()
    return max(complete, key=lambda stored: stored.state.step, default=None)


def find_latest(checkpoints: list[Checkpoint | None]) -> TrainState | None:
    """Return the state with the most steps among the complete checkpoints, None if there is none.

    Args:
        checkpoints: checkpoints to compare; None entries are skipped.
    """
    states = [stored.state for checkpoint in checkpoints if checkpoint and (stored := _load_complete(checkpoint))]
    return max(states, key=lambda state: state.step, default=None)


def _load_complete(checkpoint: Checkpoint) -> StoredCheckpoint | None:
    """Load a checkpoint; return None if it is missing or truncated."""
    try:
        return StoredCheckpoint(checkpoint, load_state(checkpoint))
    except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError, SafetensorError):
        return None


def _remove_truncated_list(storage: CheckpointStorage) -> None:
    path = f"{storage.folder}/{SNAPSHOT}"
    if storage.reached.get_file_info(path).type == FileType.NotFound:
        return
    with storage.reached.open_input_stream(path) as file:
        content = file.read()
    try:
        json.loads(content)
    except ValueError:
        storage.reached.delete_file(path)

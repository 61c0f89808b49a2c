"""The `trimtab gc` command: lists unused files and, on request, removes them.

It always keeps the sources of registered versions, runs that are in progress or can be resumed, files that wait to be sent to
MLflow, and files that were modified recently.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import settings
from trimtab.artifacts.card import FILE
from trimtab.cli.console import console, print_line
from trimtab.detection.signal_dataset import read_dataset
from trimtab.detection.signal_files import META
from trimtab.errors import ArtifactError, UsageError
from trimtab.jobs.gc.config import GcConfig
from trimtab.jobs.runtime import run_state
from trimtab.jobs.runtime.config import as_source_list
from trimtab.tracking import registry, runs
from trimtab.tracking.registry import Version
from trimtab.tracking.runs import TrackedRun
from trimtab.util.atomic_files import LOCK, exclusive_lock, is_locked, remove_path

DAY = 86_400.0
OUTBOX = "outbox"
# Name of a run folder of `trimtab align`: the start time.
ALIGNED = re.compile(r"\d{8}-\d{6}-\d{6}")


@dataclass(frozen=True)
class UnusedFile:
    """Unused file or folder.

    Attributes:
        what: kind, such as "checkpoints" or "download".
        path: path of the file or folder; for an outbox, of its file of entries.
        bytes: size in bytes.
        why: reason why it is unused.
    """

    what: str
    path: Path
    bytes: int
    why: str


def run_gc(config: GcConfig) -> dict[str, Any]:
    """Print the unused files, and remove them with `--remove true`.

    Returns:
        The `--json` output.

    Raises:
        TrackingError: if the registry cannot be read, so that unused files cannot be determined.
        ArtifactError: if a folder of `signals` holds no signals.
    """
    unused = find_unused(config)
    table = Table("what", "path", "MiB", "why")
    for entry in unused:
        table.add_row(entry.what, str(entry.path), f"{entry.bytes / 2**20:.1f}", entry.why)
    if unused:
        console.print(table)
    if config.remove:
        unused = [entry for entry in unused if remove_unused(entry)]
    total = sum(entry.bytes for entry in unused)
    action = "removed" if config.remove else "would remove (with --remove true)"
    print_line(f"{action}: {len(unused)}, {total / 2**20:.1f} MiB")
    entries = [asdict(entry) | {"path": str(entry.path)} for entry in unused]
    return {"removed": config.remove, "waste": entries, "bytes": total}


def find_unused(config: GcConfig) -> list[UnusedFile]:
    """Return the unused files and folders, the largest first.

    Raises:
        TrackingError: if the registry cannot be read.
        ArtifactError: if a folder of `signals` holds no signals.
    """
    versions = registry.list_versions()
    cutoff = time.time() - config.min_age_days * DAY
    signals = as_source_list(config.signals)
    unused = [
        *_find_checkpoints(versions),
        *_find_downloads(versions),
        *_find_outboxes(),
        *_find_signals(signals, versions),
    ]
    unsent = runs.find_unsent_runs(settings.get_home() / "outbox")
    removable = [entry for entry in unused if not any(path.is_relative_to(entry.path) for path in unsent)]
    old = [entry for entry in removable if max(map(_get_last_modified, _list_parts(entry.what, entry.path))) < cutoff]
    return sorted(old, key=lambda entry: -entry.bytes)


def remove_unused(entry: UnusedFile) -> bool:
    """Remove an unused file or folder, unless a job began to use it after it was listed.

    Returns:
        Whether it was removed.
    """
    if entry.what == OUTBOX:
        return TrackedRun(entry.path.stem, entry.path.parent).remove()
    folder = {"run": entry.path, "checkpoints": entry.path.parent}.get(entry.what)
    if folder is None:
        remove_path(entry.path)
        return True
    try:
        with exclusive_lock(folder):
            remove_path(entry.path)
    except UsageError as error:
        print_line(f"not removed: {error}")
        return False
    return True


def _find_checkpoints(versions: list[Version]) -> Iterator[UnusedFile]:
    """Yield checkpoints of finished training, and unused runs of `trimtab align`.

    A run of `trimtab align` is unused if it is finished but has no version, or if it was stopped and a later run exists.
    Studies and sweeps resume in their folders, so only their checkpoints of finished training are unused.
    """
    registered = {version.run_id for version in versions}
    for parent in sorted(settings.get_runs_folder().glob("*")):
        run_folders = sorted(folder for folder in parent.glob("*") if (folder / run_state.FILE).exists())
        newest = max((folder for folder in run_folders if ALIGNED.fullmatch(folder.name)), default=None)
        for folder in (folder for folder in run_folders if not is_locked(folder)):
            is_align = ALIGNED.fullmatch(folder.name) is not None
            done = (folder / ("done" if is_align else f"prefix/{FILE}")).exists()
            if is_align and done and _read_run_id(folder) not in registered:
                yield _build_entry("run", folder, "finished, and not registered as a version")
            elif done and (folder / "train").exists():
                yield _build_entry("checkpoints", folder / "train", "training is finished and its prefix is saved")
            elif is_align and not done and folder != newest:
                yield _build_entry("run", folder, "stopped, and a later run of this name exists")


def _find_downloads(versions: list[Version]) -> Iterator[UnusedFile]:
    """Yield local copies of versions without an alias; they are downloaded again when needed."""
    aliased = {f"{registry.format_model_name(v.base, v.name)}/{v.version}" for v in versions if v.aliases}
    for folder in sorted((settings.get_home() / "registry").glob("*/*")):
        if f"{folder.parent.name}/{folder.name}" not in aliased:
            yield _build_entry("download", folder, "version without an alias; it can be downloaded again")


def _find_outboxes() -> Iterator[UnusedFile]:
    """Yield outboxes that were sent to MLflow completely."""
    for outbox in sorted((settings.get_home() / "outbox").glob("*.outbox")):
        if not TrackedRun(outbox.stem, outbox.parent).list_unsent():
            yield _build_entry(OUTBOX, outbox, "sent to MLflow completely")


def _find_signals(folders: list[str], versions: list[Version]) -> Iterator[UnusedFile]:
    """Yield the folders of signals that no detector in the registry was trained on.

    Raise ArtifactError for a folder without signals.
    """
    used = {entry.get("digest") for v in versions if v.kind == "detector" for entry in registry.load_card(v).data}
    for folder in map(Path, folders):
        if not (folder / META).exists():
            raise ArtifactError(f"{folder} holds no signals. Give folders written by trimtab collect to --signals")
        if read_dataset(folder).digest not in used:
            yield _build_entry("signals", folder, "no detector in the registry was trained on them")


def _read_run_id(folder: Path) -> str | None:
    try:
        record = run_state.read_run_record(folder)
        return record.run_id if record else None
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def _build_entry(what: str, path: Path, why: str) -> UnusedFile:
    files = [file for part in _list_parts(what, path) for file in (part, *part.rglob("*")) if file.is_file()]
    return UnusedFile(what, path, sum(file.stat().st_size for file in files), why)


def _list_parts(what: str, path: Path) -> list[Path]:
    """Return the paths of an entry: an outbox has several files, any other entry is one file or folder."""
    return sorted(path.parent.glob(f"{path.stem}.*")) if what == OUTBOX else [path]


def _get_last_modified(path: Path) -> float:
    """Return the latest modification time in a file or folder, in seconds since the epoch."""
    return max(p.stat().st_mtime for p in (path, *path.rglob("*")) if p.name != LOCK)

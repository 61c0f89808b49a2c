"""`trimtab gc`: what nothing refers to any more, shown first, removed when asked to.

Kept in any case: what a version in the registry was made from, runs that can be resumed or that a job works on, what waits
to be sent to MLflow, and what is younger than a time.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab import settings
from trimtab.artifacts.card import FILE
from trimtab.cli.console import console, print_line
from trimtab.errors import ArtifactError
from trimtab.jobs.collect.signal_dataset import META, read_dataset
from trimtab.jobs.gc.config import GcConfig
from trimtab.jobs.runtime import run_state
from trimtab.jobs.runtime.config import as_source_list
from trimtab.tracking import registry, runs
from trimtab.tracking.registry import Version
from trimtab.util.atomic_files import LOCK, is_locked

DAY = 86_400.0
# How `trimtab align` names a run's folder, by the time.
ALIGNED = re.compile(r"\d{8}-\d{6}-\d{6}")


@dataclass(frozen=True)
class UnusedFile:
    """Something to remove: what it is, where, how many bytes, and why nothing needs it."""

    what: str
    path: Path
    bytes: int
    why: str


def run_gc(config: GcConfig) -> dict[str, Any]:
    """Show what can go, and remove it with `--remove true`. Raises TrackingError where the registry cannot be asked: then
    nothing is known to be unneeded."""
    found = find_unused(config)
    shown = Table("what", "path", "MiB", "why")
    for one in found:
        shown.add_row(one.what, str(one.path), f"{one.bytes / 2**20:.1f}", one.why)
    if found:
        console.print(shown)
    if config.remove:
        for one in found:
            remove_unused(one.path)
    total = sum(one.bytes for one in found) / 2**20
    print_line(f"{'removed' if config.remove else 'would remove (with --remove true)'}: {len(found)}, {total:.1f} MiB")
    entries = [asdict(one) | {"path": str(one.path)} for one in found]
    return {"removed": config.remove, "waste": entries, "bytes": sum(one.bytes for one in found)}


def find_unused(config: GcConfig) -> list[UnusedFile]:
    """All that can go, the largest first."""
    versions = registry.list_versions()
    youngest = time.time() - config.days * DAY
    found = [*_checkpoints(versions), *_downloads(versions), *_outboxes(), *_signals(as_source_list(config.signals), versions)]
    waiting = runs.find_unsent_runs(settings.get_home() / "outbox")
    free = [one for one in found if not any(path.is_relative_to(one.path) for path in waiting)]
    old = [one for one in free if _touched(one.path) < youngest]
    return sorted(old, key=lambda one: -one.bytes)


def remove_unused(path: Path) -> None:
    """Remove a folder or a file; gone already is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _checkpoints(versions: list[Version]) -> Iterator[UnusedFile]:
    """Checkpoints of training that is done, as the prefix that it led to is beside them; whole runs of `trimtab align` that led
    to no version, or were stopped and begun again. Studies and sweeps go on where they are, and keep the rest."""
    used = {version.run_id for version in versions}
    for parent in sorted(settings.get_runs_folder().glob("*")):
        began = sorted(folder for folder in parent.glob("*") if (folder / run_state.FILE).exists())
        newest = max((folder for folder in began if ALIGNED.fullmatch(folder.name)), default=None)
        for folder in (folder for folder in began if not is_locked(folder)):
            aligned = ALIGNED.fullmatch(folder.name) is not None
            done = (folder / ("done" if aligned else f"prefix/{FILE}")).exists()
            if aligned and done and _run_id(folder) not in used:
                yield _waste("run", folder, "it is done, and no version was made of it")
            elif done and (folder / "train").exists():
                yield _waste("checkpoints", folder / "train", "the training is done, its prefix is beside them")
            elif aligned and not done and folder != newest:
                yield _waste("run", folder, "it was stopped, and a later run of this name was begun")


def _downloads(versions: list[Version]) -> Iterator[UnusedFile]:
    """Copies of versions that no alias names; they are downloaded again where they are asked for."""
    named = {f"{registry.format_model_name(v.base, v.name)}/{v.version}" for v in versions if v.aliases}
    for folder in sorted((settings.get_home() / "registry").glob("*/*")):
        if f"{folder.parent.name}/{folder.name}" not in named:
            yield _waste("download", folder, "no alias names this version; it can be downloaded again")


def _outboxes() -> Iterator[UnusedFile]:
    """What was sent to MLflow in full."""
    for outbox in sorted((settings.get_home() / "outbox").glob("*.outbox")):
        sent = outbox.with_suffix(".sent")
        if sent.exists() and int(sent.read_text() or 0) >= len(outbox.read_text().splitlines()):
            for path in sorted(outbox.parent.glob(f"{outbox.stem}.*")):
                yield _waste("outbox", path, "all of it is in MLflow")


def _signals(folders: list[str], versions: list[Version]) -> Iterator[UnusedFile]:
    """Signals, of the folders that were named, from which no detector in the registry has learned. Raises ArtifactError for a
    folder that holds something else."""
    used = {entry.get("digest") for v in versions if v.kind == "detector" for entry in registry.load_card(v).data}
    for folder in map(Path, folders):
        if not (folder / META).exists():
            raise ArtifactError(f"{folder} holds no signals: --signals takes folders that trimtab collect wrote")
        if read_dataset(folder).digest not in used:
            yield _waste("signals", folder, "no detector in the registry has learned from them")


def _run_id(folder: Path) -> str | None:
    try:
        known = run_state.read_run_record(folder)
        return known.run_id if known else None
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def _waste(what: str, path: Path, why: str) -> UnusedFile:
    held = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return UnusedFile(what, path, sum(file.stat().st_size for file in held), why)


def _touched(path: Path) -> float:
    """When something in it was last written."""
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")) if each.name != LOCK)

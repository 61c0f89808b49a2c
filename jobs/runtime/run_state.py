"""Link from a run folder to its MLflow run, stored in run.json, so that the same command resumes the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.errors import UsageError
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun
from trimtab.util.atomic_files import write_atomic

FILE = "run.json"
# Version of the names in `config`; 0.1.0 wrote none.
VERSION = 2


@dataclass(frozen=True)
class RunRecord:
    """Content of run.json.

    Attributes:
        run_id: id of the MLflow run.
        config: settings and data of the run that must not change when it is resumed; empty if there are none.
        version: version of the names in `config`.
    """

    run_id: str
    config: Mapping[str, Any]
    version: int = VERSION


def read_run_record(folder: Path) -> RunRecord | None:
    """Read the run record of a folder, None if there is none.

    Raises:
        json.JSONDecodeError, KeyError: if the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return RunRecord(record["run_id"], record.get("config", {}), record.get("version", 1))


def check_run_version(record: RunRecord, folder: Path) -> None:
    """Raise UsageError if the settings of a run have the names of release 0.1.0."""
    if record.version != VERSION:
        raise UsageError(
            f"cannot resume {folder}: trimtab 0.1.0 started it, and its settings have other names. Finish it with 0.1.0, or "
            "start a new run"
        )


def create_or_resume_run(
    folder: Path, name: str, kind: str, parent: str | None = None, config: Mapping[str, Any] | None = None
) -> TrackedRun:
    """Resume the MLflow run of a folder, or start a new one and record it in the folder.

    Args:
        folder: run folder; created if needed.
        name: name of the MLflow run.
        kind: kind of the run, such as "align" or "sweep".
        parent: id of the parent run of a new run.
        config: settings and data that must not change when the run is resumed.

    Raises:
        TrackingError: if the tracking server does not respond.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = read_run_record(folder)
    run = runs.start_run(name, kind, settings.get_home() / "outbox", record.run_id if record else None, parent)
    write_atomic(folder / FILE, json.dumps({"run_id": run.run_id, "config": config or {}, "version": VERSION}, indent=2))
    return run

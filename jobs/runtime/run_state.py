"""The MLflow run that a folder of work belongs to, kept in a file there, so that the same command goes on in it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.tracking import runs
from trimtab.tracking.runs import TrackedRun
from trimtab.util.atomic_files import write_atomic

FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder knows it: its id, and the settings and data that it was begun with, where they must stay the same."""

    run_id: str
    config: Mapping[str, Any]


def read_run_record(folder: Path) -> RunRecord | None:
    """What `join` kept in a folder, None before."""
    path = folder / FILE
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return RunRecord(kept["run_id"], kept.get("config", {}))


def create_or_resume_run(
    folder: Path, name: str, kind: str, parent: str | None = None, config: Mapping[str, Any] | None = None
) -> TrackedRun:
    """Go on with the run that the folder knows, or begin one, under the run `parent` where given, and keep it there.

    Raises TrackingError where the store does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = read_run_record(folder)
    run = runs.start_run(name, kind, settings.get_home() / "outbox", begun.run_id if begun else None, parent)
    write_atomic(folder / FILE, json.dumps({"run_id": run.run_id, "config": config or {}}, indent=2))
    return run

"""Run folders of a job, `runs/NAME/TIME`: the newest unfinished one to resume, or a new one."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from trimtab import settings
from trimtab.errors import UsageError
from trimtab.jobs.runtime.run_state import FILE, check_run_version, read_run_record
from trimtab.tracking import runs

# File that marks a finished run.
DONE = "done"


def choose_run_folder(name: str, resume: bool | Literal["auto"], identity: Mapping[str, Any]) -> Path:
    """Return the folder of the newest unfinished run if it is to be resumed, else a new folder.

    Args:
        name: name of the artifact.
        resume: whether to resume the newest unfinished run; `auto` resumes it if its settings are the same.
        identity: settings and data of the run that must not change.

    Raises:
        UsageError: if there is no unfinished run to resume, or if its settings or data differ.
    """
    unfinished = get_unfinished_run(name) if resume is True else find_unfinished_run(name)
    if resume and unfinished and (record := read_run_record(unfinished)):
        previous = runs.flatten_settings(record.config)
        changed = sorted(k for k, v in runs.flatten_settings(identity).items() if previous.get(k) != v)
        if not changed:
            return unfinished
        if resume is True:
            check_run_version(record, unfinished)
            raise UsageError(
                f"cannot resume the unfinished run of {name!r}: different settings or data ({', '.join(changed)}). "
                "Use the same ones, or omit --resume to start a new run"
            )
    folder = settings.get_runs_folder() / name / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    return folder


def find_unfinished_run(name: str) -> Path | None:
    """Return the folder of the newest unfinished run; None if there is none."""
    folders = (settings.get_runs_folder() / name).glob("*")
    return max((f for f in folders if (f / FILE).exists() and not (f / DONE).exists() and read_run_record(f)), default=None)


def get_unfinished_run(name: str) -> Path:
    """Return the folder of the newest unfinished run. Raise UsageError if there is none."""
    unfinished = find_unfinished_run(name)
    if unfinished is None:
        raise UsageError(f"there is no unfinished run of {name!r} to resume. Omit --resume to start a new run")
    return unfinished

"""One MLflow run per job, which survives an outage of the store: what cannot be sent waits in a file and is sent later."""

import errno
import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from trimtab.cli.console import print_line
from trimtab.errors import InterruptedByUserError, TrackingError
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.tracking.code_version import get_code_tags, get_uncommitted_patch, list_packages
from trimtab.util.atomic_files import write_atomic

RETRY_SECONDS = 15.0
# What MLflow takes at once.
MOST_METRICS = 1000


@dataclass(frozen=True)
class TrackedRun:
    """A run known by its id; `folder` keeps what is still to be sent. Picklable: the driver, the controller of a Ray Train job
    and a later retry all write to the same run."""

    run_id: str
    folder: Path

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested ones by dotted names."""
        self._put("params", {k: str(v)[:5000] for k, v in flatten_settings(values).items()})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""
        self.log_curves([{"step": step, **values}])

    def log_curves(self, steps: Sequence[Mapping[str, float]], prefix: str = "") -> None:
        """Log metrics of several steps at once, each with its `step`; all of them are kept, or none."""
        lines = [{"step": int(s["step"]), "values": {f"{prefix}{k}": v for k, v in s.items() if k != "step"}} for s in steps]
        if lines:
            self._put("metrics", {"steps": lines, "time": int(time.time() * 1000)})

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._put("tags", dict(values))

    def log_artifacts(self, path: Path, under: str = "") -> None:
        """Upload a file, or a folder's files."""
        self._put("artifacts", {"path": str(path.absolute()), "under": under})

    def log_inputs(self, data: Sequence[Mapping[str, Any]], context: str) -> None:
        """Record data inputs: entries {name, digest, rows} as cards have them; `context` says for what (training, ...)."""
        self._put("inputs", {"data": [dict(d) for d in data], "context": context})

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._put("finish", {"status": status})
        self.flush(patient=True)

    def flush(self, patient: bool = False) -> int:
        """Send what waits, in order; returns how many entries still wait. Never raises for an outage.

        After a failure nothing is tried for 15 seconds, so that a long outage does not slow the work down; `patient`
        tries at once.
        """
        # `trimtab sync` may be at it as well.
        with FileLock(self._path("lock")):
            return self._flushed(patient)

    def _flushed(self, patient: bool) -> int:
        waiting = self._waiting()
        sent = self._sent()
        if not patient and self._resting():
            return len(waiting) - sent
        for entry in waiting[sent:]:
            try:
                with wrap_tracking_errors("log to the run"):
                    SEND[entry["kind"]](self.run_id, entry["body"])
            except TrackingError:
                self._path("rest").touch()
                break
            sent += 1
            write_atomic(self._path("sent"), str(sent))
        return len(waiting) - sent

    def has_unsent(self) -> list[dict[str, Any]]:
        """What is still to be sent."""
        return self._waiting()[self._sent() :]

    def _put(self, kind: str, body: Mapping[str, Any]) -> None:
        line = (json.dumps({"kind": kind, "body": body}) + "\n").encode()
        # Without a buffer, so that a full disk leaves no half of a line behind.
        with self._path("outbox").open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        self.flush()

    def _waiting(self) -> list[dict[str, Any]]:
        path = self._path("outbox")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _sent(self) -> int:
        path = self._path("sent")
        return int(path.read_text()) if path.exists() else 0

    def _resting(self) -> bool:
        path = self._path("rest")
        return path.exists() and time.time() - path.stat().st_mtime < RETRY_SECONDS

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{self.run_id}.{name}"


def start_run(name: str, kind: str, folder: Path, resumed: str | None = None, parent: str | None = None) -> TrackedRun:
    """Begin a run, under the run `parent` where given, or go on with the run `resumed`.

    Raises TrackingError where the store does not answer.
    """
    with wrap_tracking_errors("start a run"):
        if resumed:
            get_client().update_run(resumed, status="RUNNING")
            return TrackedRun(resumed, folder)
        tags = {"trimtab.kind": kind, **({"mlflow.parentRunId": parent} if parent else {}), **get_code_tags()}
        made = get_client().create_run(get_experiment_id(), run_name=name, tags=tags)
    run = TrackedRun(str(made.info.run_id), folder)
    if not parent:
        _log_code(run)
    return run


@contextmanager
def close_run(run: TrackedRun) -> Generator[None]:
    """End a run as its work ends: FINISHED, KILLED where the user stopped it, else FAILED."""
    try:
        yield
    except (InterruptedByUserError, KeyboardInterrupt):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def find_unsent_runs(folder: Path) -> list[Path]:
    """Files and folders that wait to be uploaded, of all runs whose outboxes are in a folder."""
    waiting = [entry for path in folder.glob("*.outbox") for entry in TrackedRun(path.stem, folder).has_unsent()]
    return [Path(entry["body"]["path"]) for entry in waiting if entry["kind"] == "artifacts"]


def read_curve(run_id: str, metric: str) -> list[tuple[int, float]]:
    """A metric's values by step. Raises TrackingError where the store does not answer."""
    with wrap_tracking_errors(f"read {metric}"):
        return sorted({m.step: m.value for m in get_client().get_metric_history(run_id, metric)}.items())


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _log_code(run: TrackedRun) -> None:
    """All packages, and what differs from git's revision, as files of the run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("packages.txt", list_packages()), ("changes.patch", get_uncommitted_patch())):
        if text:
            # A folder of the run's own: the file's name is the artifact's, and it waits here through an outage.
            path = run.folder / f"{run.run_id}.code" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            run.log_artifacts(path, "code")


def _send_params(run_id: str, body: Mapping[str, Any]) -> None:
    # A param may be set once; a resumed run sends the same ones again, which MLflow accepts when they are equal.
    known = get_client().get_run(run_id).data.params
    fresh = [Param(k, v) for k, v in body.items() if k not in known]
    for at in range(0, len(fresh), 100):
        get_client().log_batch(run_id, params=fresh[at : at + 100])


def _send_metrics(run_id: str, body: Mapping[str, Any]) -> None:
    metrics = [Metric(k, v, body["time"], line["step"]) for line in body["steps"] for k, v in line["values"].items()]
    for at in range(0, len(metrics), MOST_METRICS):
        get_client().log_batch(run_id, metrics=metrics[at : at + MOST_METRICS])


def _send_tags(run_id: str, body: Mapping[str, Any]) -> None:
    get_client().log_batch(run_id, tags=[RunTag(k, v) for k, v in body.items()])


def _send_artifacts(run_id: str, body: Mapping[str, Any]) -> None:
    path = Path(body["path"])
    if not path.exists():
        # What was removed meanwhile must not hold up all that comes after it.
        print_line(f"{path} is gone, and was not logged")
        return
    send = get_client().log_artifacts if path.is_dir() else get_client().log_artifact
    send(run_id, str(path), body["under"] or None)


def _send_inputs(run_id: str, body: Mapping[str, Any]) -> None:
    datasets = [
        DatasetInput(
            Dataset(d["name"], d["digest"], "local", json.dumps({"uri": d["name"]}), profile=json.dumps({"rows": d["rows"]})),
            [InputTag("mlflow.data.context", body["context"])],
        )
        for d in body["data"]
    ]
    get_client().log_inputs(run_id, datasets)


def _send_finish(run_id: str, body: Mapping[str, Any]) -> None:
    get_client().set_terminated(run_id, body["status"])


SEND = {
    "params": _send_params,
    "metrics": _send_metrics,
    "tags": _send_tags,
    "artifacts": _send_artifacts,
    "inputs": _send_inputs,
    "finish": _send_finish,
}

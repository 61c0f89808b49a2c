"""MLflow runs that survive an outage of the store.

Each entry is appended to an outbox file before it is sent. Entries that cannot be sent stay there until a later flush.
"""

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
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode

from trimtab.cli.console import print_line
from trimtab.errors import InterruptedByUserError, TrackingError
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.tracking.code_version import get_code_tags, get_uncommitted_patch, list_packages
from trimtab.util.atomic_files import remove_path, write_atomic
from trimtab.util.json_files import parse_json_line

RETRY_SECONDS = 15.0
# Maximum number of metrics per request of MLflow.
MAX_METRICS = 1000


@dataclass(frozen=True)
class TrackedRun:
    """MLflow run with an outbox.

    Picklable, so that the driver, the controller of a Ray Train job and a later retry can log to the same run.

    Attributes:
        run_id: id of the MLflow run.
        folder: folder of the outbox.
    """

    run_id: str
    folder: Path

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters. Nested mappings are flattened to dotted names."""
        self._put("params", {k: str(v)[:5000] for k, v in flatten_settings(values).items()})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        self.log_curves([{"step": step, **values}])

    def log_curves(self, steps: Sequence[Mapping[str, float]], prefix: str = "") -> None:
        """Log the metrics of several steps as a single entry.

        Args:
            steps: metrics by name for each step, with the step number as `step`.
            prefix: prefix for the names of the metrics.
        """
        points = [{"step": int(s["step"]), "values": {f"{prefix}{k}": v for k, v in s.items() if k != "step"}} for s in steps]
        if points:
            self._put("metrics", {"steps": points, "time": int(time.time() * 1000)})

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._put("tags", dict(values))

    def log_artifacts(self, path: Path, under: str = "") -> None:
        """Upload a file or the files of a folder.

        Args:
            path: file or folder, which must exist until it is sent.
            under: folder in the run's artifacts.
        """
        self._put("artifacts", {"path": str(path.absolute()), "under": under})

    def log_inputs(self, data: Sequence[Mapping[str, Any]], context: str) -> None:
        """Log data sets as inputs of the run.

        Args:
            data: entries {name, digest, rows}, as in cards.
            context: use of the data, such as "training".
        """
        self._put("inputs", {"data": [dict(d) for d in data], "context": context})

    def finish(self, status: str) -> None:
        """End the run with a status: FINISHED, FAILED or KILLED."""
        self._put("finish", {"status": status})
        self.flush(patient=True)

    def flush(self, patient: bool = False) -> int:
        """Send the pending entries in order. An outage raises no error.

        Args:
            patient: retry even if an attempt failed within the last 15 seconds. By default such a call sends nothing, so that a
                long outage does not slow down the job.

        Returns:
            Number of entries that are still pending.
        """
        # Another process may send the same outbox, for example `trimtab sync`.
        with FileLock(self._path("lock")):
            return self._send_pending(patient)

    def _send_pending(self, patient: bool) -> int:
        entries = self._read_outbox()
        sent = self._read_sent_count()
        if not patient and self._is_backing_off():
            return len(entries) - sent
        for entry in entries[sent:]:
            try:
                with wrap_tracking_errors("log to the run"):
                    SEND[entry["kind"]](self.run_id, entry["body"])
            except TrackingError as error:
                if not _is_rejection(error):
                    self._path("rest").touch()
                    break
                # A later attempt would fail as well, and the entry must not block the later ones.
                print_line(f"MLflow rejected an entry ({entry['kind']}) of run {self.run_id}, which was not logged: {error}")
                with self._path("rejected").open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            sent += 1
            write_atomic(self._path("sent"), str(sent))
        return len(entries) - sent

    def list_unsent(self) -> list[dict[str, Any]]:
        """Return the pending entries."""
        return self._read_outbox()[self._read_sent_count() :]

    def remove(self) -> bool:
        """Remove the files of the outbox, unless entries are pending.

        Returns:
            Whether they were removed.
        """
        with FileLock(self._path("lock")), FileLock(self._path("outbox.lock")):
            if self.list_unsent():
                return False
            # The count of sent entries first: an outbox that remains is only sent again, while a count that remains would
            # hide the entries of a resumed run.
            for path in (self._path("sent"), *self.folder.glob(f"{self.run_id}.*")):
                # Another process may wait for a lock.
                if path.suffix != ".lock":
                    remove_path(path)
        return True

    def _put(self, kind: str, body: Mapping[str, Any]) -> None:
        line = (json.dumps({"kind": kind, "body": body}) + "\n").encode()
        # Unbuffered, so that a partial write on a full disk is detected and undone here.
        with FileLock(self._path("outbox.lock")), self._path("outbox").open("ab+", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            file.seek(max(0, start - 1))
            if file.read() not in (b"", b"\n"):
                # A power failure left half a line, which must not damage this one.
                line = b"\n" + line
            if file.write(line) < len(line):
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        self.flush()

    def _read_outbox(self) -> list[dict[str, Any]]:
        """Return the complete entries; a power failure can leave half a line."""
        path = self._path("outbox")
        return list(filter(None, map(parse_json_line, path.read_bytes().splitlines()))) if path.exists() else []

    def _read_sent_count(self) -> int:
        path = self._path("sent")
        return int(path.read_text()) if path.exists() else 0

    def _is_backing_off(self) -> bool:
        path = self._path("rest")
        # A negative age means that the clock was set back.
        return path.exists() and 0 <= time.time() - path.stat().st_mtime < RETRY_SECONDS

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{self.run_id}.{name}"


def start_run(name: str, kind: str, folder: Path, resumed: str | None = None, parent: str | None = None) -> TrackedRun:
    """Start a new run or resume one.

    Args:
        name: name of the run.
        kind: command that the run belongs to, for the tag `trimtab.kind`.
        folder: folder of the outbox.
        resumed: id of the run to resume; None starts a new run.
        parent: id of the parent run.

    Raises:
        TrackingError: if MLflow cannot be reached.
    """
    with wrap_tracking_errors("start a run"):
        if resumed:
            get_client().update_run(resumed, status="RUNNING")
            return TrackedRun(resumed, folder)
        tags = {"trimtab.kind": kind, **({"mlflow.parentRunId": parent} if parent else {}), **get_code_tags()}
        created = get_client().create_run(get_experiment_id(), run_name=name, tags=tags)
    run = TrackedRun(str(created.info.run_id), folder)
    if not parent:
        _log_code(run)
    return run


@contextmanager
def close_run(run: TrackedRun) -> Generator[None]:
    """Context manager that ends a run: FINISHED on success, KILLED if the user interrupts the job, FAILED on other errors."""
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
    """Return the files and folders that all outboxes of a folder still have to upload."""
    pending = [entry for path in folder.glob("*.outbox") for entry in TrackedRun(path.stem, folder).list_unsent()]
    return [Path(entry["body"]["path"]) for entry in pending if entry["kind"] == "artifacts"]


def read_curve(run_id: str, metric: str) -> list[tuple[int, float]]:
    """Read the values of a metric.

    Args:
        run_id: id of the MLflow run.
        metric: name of the metric.

    Returns:
        Pairs of step and value, sorted by step.

    Raises:
        TrackingError: if MLflow cannot be reached.
    """
    with wrap_tracking_errors(f"read {metric}"):
        return sorted({m.step: m.value for m in get_client().get_metric_history(run_id, metric)}.items())


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one flat mapping with dotted keys.

    Args:
        values: mapping whose values may be mappings.
        prefix: prefix for all keys.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _log_code(run: TrackedRun) -> None:
    """Log the package versions and the uncommitted changes as artifacts of the run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("packages.txt", list_packages()), ("changes.patch", get_uncommitted_patch())):
        if text:
            # One folder per run: the file must keep the artifact's name and must exist until it is sent.
            path = run.folder / f"{run.run_id}.code" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            run.log_artifacts(path, "code")


def _is_rejection(error: TrackingError) -> bool:
    """Return whether MLflow rejects the values of an entry, rather than being unavailable."""
    cause = error.__cause__
    return isinstance(cause, MlflowException) and cause.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE)


def _send_params(run_id: str, body: Mapping[str, Any]) -> None:
    # MLflow params cannot be changed, and a resumed run logs its params again.
    logged = get_client().get_run(run_id).data.params
    params = [Param(k, v) for k, v in body.items() if k not in logged]
    for start in range(0, len(params), 100):
        get_client().log_batch(run_id, params=params[start : start + 100])


def _send_metrics(run_id: str, body: Mapping[str, Any]) -> None:
    metrics = [Metric(k, v, body["time"], point["step"]) for point in body["steps"] for k, v in point["values"].items()]
    for start in range(0, len(metrics), MAX_METRICS):
        get_client().log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def _send_tags(run_id: str, body: Mapping[str, Any]) -> None:
    get_client().log_batch(run_id, tags=[RunTag(k, v) for k, v in body.items()])


def _send_artifacts(run_id: str, body: Mapping[str, Any]) -> None:
    path = Path(body["path"])
    if not path.exists():
        # A file that was removed must not block the later entries.
        print_line(f"{path} does not exist any more and was not logged")
        return
    upload = get_client().log_artifacts if path.is_dir() else get_client().log_artifact
    upload(run_id, str(path), body["under"] or None)


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

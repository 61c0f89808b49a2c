"""MLflow client with short timeouts and a single error class."""

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import AssessmentSource, AssessmentSourceType
from mlflow.exceptions import MlflowException
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from trimtab import settings
from trimtab.errors import TrackingError

EXPERIMENT = "trimtab"
# Tag of a trace with the request id of the server.
SERVER_ID = "trimtab.server_id"
# Two changes of a file within less than this time may get the same modification time.
SETTLED_SECONDS = 1.0


def get_client() -> MlflowClient:
    """Return the client of the MLflow store that the environment selects."""
    uri = settings.get_tracking_uri()
    client = _create_client(uri)
    # Parts of MLflow create their own clients and read the store only from these global settings.
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    return client


@lru_cache(maxsize=4)
def _create_client(uri: str) -> MlflowClient:
    settings.prepare_environment()
    # A new SQLite store logs each of its migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def get_experiment_id(name: str = EXPERIMENT) -> str:
    """Return the id of an experiment, and create the experiment on first use.

    The artifacts of a new experiment are stored in trimtab's home if the store is a SQLite file, otherwise at the location that
    the MLflow server selects.
    """
    experiment = get_client().get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    uri = settings.get_tracking_uri()
    local = (settings.get_home() / "mlflow" / "artifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(get_client().create_experiment(name, artifact_location=local))


def read_store_stamp() -> tuple[tuple[int, int], ...] | None:
    """Read sizes and modification times of the files of a local store.

    Returns:
        A value that differs after every change of the store; None if the store is no SQLite file, or if its last change is so
        recent that a further one could have the same time.
    """
    uri = settings.get_tracking_uri()
    if not uri.startswith("sqlite:") or not (database := make_url(uri).database):
        return None
    stamps: list[tuple[int, int]] = []
    for suffix in ("", "-wal"):
        try:
            status = Path(database + suffix).stat()
        except FileNotFoundError:
            stamps.append((0, 0))
            continue
        if time.time() - status.st_mtime < SETTLED_SECONDS:
            return None
        stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


@contextmanager
def wrap_tracking_errors(what: str) -> Generator[None]:
    """Convert the errors of MLflow and its store to TrackingError.

    Args:
        what: operation for the error message, such as "start a run".

    Raises:
        TrackingError: if the store cannot be reached or rejects the operation.
    """
    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError, OSError) as error:
        # Error messages of libraries contain the store's address, which may include a password.
        reason = str(error).replace(settings.get_tracking_uri(), settings.get_shown_uri()).splitlines()[0][:200]
        raise TrackingError(f"MLflow at {settings.get_shown_uri()}: cannot {what} ({reason})") from error


class RequestTraces:
    """MLflow traces of served requests, in the experiment of the jobs. MLflow sends them in the background."""

    def __init__(self) -> None:
        self._experiment = get_experiment_id()

    def log(
        self,
        name: str,
        inputs: Mapping[str, Any],
        attributes: Mapping[str, Any],
        started: int,
        ended: int,
        *,
        failed: bool,
        server_id: str = "",
    ) -> None:
        """Log a trace with one span.

        Args:
            name: name of the span.
            inputs: inputs of the span.
            attributes: attributes of the span; values are converted to strings.
            started: start in nanoseconds since 1970.
            ended: end in nanoseconds since 1970.
            failed: whether the request failed.
            server_id: request id of the server, by which `add_feedback` finds the trace.
        """
        span = mlflow.start_span_no_context(
            name,
            inputs=dict(inputs),
            attributes={key: str(value) for key, value in attributes.items()},
            tags={SERVER_ID: server_id},
            experiment_id=self._experiment,
            start_time_ns=started,
        )
        span.end(status="ERROR" if failed else "OK", end_time_ns=ended)

    def add_feedback(self, server_id: str, name: str, rater: str, metadata: Mapping[str, str], *, value: bool) -> bool:
        """Add an assessment to the trace of a request.

        Args:
            server_id: request id of the server.
            name: name of the assessment.
            rater: name of the rater.
            metadata: further facts about the label.
            value: value of the assessment.

        Returns:
            Whether the request has a trace.
        """
        self.flush()
        traces = get_client().search_traces(
            [self._experiment], f"tags.`{SERVER_ID}` = '{server_id}'", max_results=1, include_spans=False
        )
        for trace in traces:
            source = AssessmentSource(AssessmentSourceType.HUMAN, rater)
            mlflow.log_feedback(trace_id=trace.info.trace_id, name=name, value=value, source=source, metadata=dict(metadata))
        return bool(traces)

    def flush(self) -> None:
        """Wait until all traces are sent."""
        mlflow.flush_trace_async_logging()

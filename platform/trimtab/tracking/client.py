"""The MLflow client as trimtab uses it: quick to notice an outage, and with one kind of error."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from trimtab import settings
from trimtab.errors import TrackingError

EXPERIMENT = "trimtab"


def get_client() -> MlflowClient:
    """A client of the store that the environment names."""
    uri = settings.get_tracking_uri()
    made = _create_client(uri)
    # Parts of MLflow make clients of their own and find the store only here.
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    return made


@lru_cache(maxsize=4)
def _create_client(uri: str) -> MlflowClient:
    settings.prepare_environment()
    # A fresh SQLite store tells of each of its migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def get_experiment_id(name: str = EXPERIMENT) -> str:
    """Id of the experiment, made on first use; its artifacts are beside a SQLite store, else where the server says."""
    found = get_client().get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = settings.get_tracking_uri()
    local = (settings.get_home() / "mlflow" / "artifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(get_client().create_experiment(name, artifact_location=local))


@contextmanager
def wrap_tracking_errors(what: str) -> Generator[None]:
    """Turn what MLflow raises when its store is away or refuses into a TrackingError that says what was wanted."""
    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError, OSError) as error:
        # Libraries name the address that they could not reach.
        reason = str(error).replace(settings.get_tracking_uri(), settings.get_shown_uri()).splitlines()[0][:200]
        raise TrackingError(f"MLflow at {settings.get_shown_uri()}: cannot {what} ({reason})") from error


class RequestTraces:
    """MLflow traces of served requests, in the experiment that jobs log to. They are sent in the background."""

    def __init__(self) -> None:
        self._experiment = get_experiment_id()

    def log(
        self, name: str, inputs: Mapping[str, Any], attributes: Mapping[str, Any], began: int, ended: int, *, failed: bool
    ) -> None:
        """Log a trace of one span.

        Args:
            name: name of the span.
            inputs: inputs of the span.
            attributes: attributes of the span; values are converted to text.
            began: start in nanoseconds since 1970.
            ended: end in nanoseconds since 1970.
            failed: whether the request failed.
        """
        span = mlflow.start_span_no_context(
            name,
            inputs=dict(inputs),
            attributes={key: str(value) for key, value in attributes.items()},
            experiment_id=self._experiment,
            start_time_ns=began,
        )
        span.end(status="ERROR" if failed else "OK", end_time_ns=ended)

    def flush(self) -> None:
        """Wait until all traces are sent."""
        mlflow.flush_trace_async_logging()

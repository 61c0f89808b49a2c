"""Traces of served requests in MLflow."""

from collections.abc import Mapping
from typing import Any

import mlflow

from trimtab.tracking.client import experiment_id


class Traces:
    """Traces in the experiment that jobs log to; sent in the background."""

    def __init__(self) -> None:
        self._experiment = experiment_id()

    def leave(
        self, name: str, inputs: Mapping[str, Any], said: Mapping[str, Any], began: int, ended: int, *, failed: bool
    ) -> None:
        """One trace of one span, from `began` to `ended` in nanoseconds since 1970."""
        attributes = {key: str(value) for key, value in said.items()}
        span = mlflow.start_span_no_context(
            name, inputs=dict(inputs), attributes=attributes, experiment_id=self._experiment, start_time_ns=began
        )
        span.end(status="ERROR" if failed else "OK", end_time_ns=ended)

    def flush(self) -> None:
        """Wait until all are sent."""
        mlflow.flush_trace_async_logging()

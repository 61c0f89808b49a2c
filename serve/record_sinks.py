"""Sinks of request records: JSON-lines log, OpenTelemetry collector and sampled MLflow traces."""

import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from queue import Queue
from typing import Protocol

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from trimtab import settings
from trimtab.engine.metrics import UNRECORDED
from trimtab.serve.background_queue import BackgroundQueue
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessRecord, format_record
from trimtab.tracking.client import RequestTraces

log = logging.getLogger(__name__)

MOST_WAITING = 1000
LOG_BYTES = 32 << 20
# Per folder, over all current and former replicas.
MOST_FILES = 64
OWNER_ONLY = 0o600
STOP_SECONDS = 5.0
DAY, SWEEP_SECONDS = 86_400.0, 3600.0
FAILED = 500


class RecordWriter(Protocol):
    """Protocol of a sink that writes one record per call and may buffer until `flush`."""

    def __call__(self, record: AccessRecord) -> None: ...

    def flush(self) -> None: ...


class RecordSinks:
    """Background thread that passes records to writers.

    A full disk or a slow collector never blocks a request: records that cannot be written are dropped and counted.

    Args:
        writers: destinations of every record.
    """

    def __init__(self, writers: Sequence[RecordWriter]) -> None:
        self._writers = writers
        self._queue: BackgroundQueue[AccessRecord] = BackgroundQueue(
            "records", MOST_WAITING, self._run, UNRECORDED, STOP_SECONDS
        )

    def __call__(self, record: AccessRecord) -> None:
        """Queue a record without blocking; drop and count it if the queue is full."""
        self._queue.put(record)

    def stop(self) -> None:
        """Write the queued records and flush the writers; give up after STOP_SECONDS per step."""
        if not self._queue.stop():
            return
        for write in self._writers:
            write.flush()

    def _run(self, queue: Queue[AccessRecord | None]) -> None:
        while (record := queue.get()) is not None:
            for write in self._writers:
                try:
                    write(record)
                except Exception:
                    UNRECORDED.inc()
                    log.warning("request record lost", exc_info=True)


def open_sinks(config: ServeConfig, replica: str) -> RecordSinks:
    """Return the sinks that the settings of a server enable.

    Args:
        config: settings of the server.
        replica: id of the replica, which is part of the name of its log file.
    """
    folder = Path(config.log_dir) if config.log_dir else settings.get_home() / "logs"
    writers: list[RecordWriter] = [LogSink(folder / f"serve-{replica}.jsonl", config.log_retention_days)]
    writers += [OtlpSink(config.otlp_traces_endpoint)] if config.otlp_traces_endpoint else []
    writers += [MlflowSink(config.trace_sampling_ratio)] if config.trace_sampling_ratio > 0 else []
    return RecordSinks(writers)


class _RaisingFileHandler(RotatingFileHandler):
    """Rotating log file for its owner that raises write errors, so that lost records are counted."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=partial(os.open, mode=OWNER_ONLY))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is that of the overridden method
        """Raise the error that is being handled."""
        if (error := sys.exception()) is not None:
            raise error


class LogSink:
    """Writer of one JSON line per request.

    Old log files in the folder are removed, including those of other replicas.

    Args:
        path: log file.
        days: age (days) at which log files are removed; of newer files, the newest MOST_FILES are kept.
    """

    def __init__(self, path: Path, days: float = 30) -> None:
        self._path, self._seconds = path, days * DAY
        self._last_cleanup = 0.0
        self._handler = _RaisingFileHandler(path, maxBytes=LOG_BYTES, backupCount=MOST_FILES - 1, delay=True)
        self.flush = self._handler.flush

    def __call__(self, record: AccessRecord) -> None:
        """Write a line; remove old files first if the last cleanup was SWEEP_SECONDS ago."""
        # Not in the constructor: a folder that cannot be made costs records, but no replica.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if time.monotonic() - self._last_cleanup > SWEEP_SECONDS or not self._last_cleanup:
            self._remove_old_files()
        self._handler.emit(logging.makeLogRecord({"msg": format_record(record)}))

    def _remove_old_files(self) -> None:
        self._last_cleanup = time.monotonic()
        modified: dict[Path, float] = {}
        for file in self._path.parent.glob("serve-*.jsonl*"):
            # Another replica may remove it at the same time.
            with suppress(FileNotFoundError):
                modified[file] = file.stat().st_mtime
        newest = sorted(modified, key=lambda file: modified[file])[-MOST_FILES + 1 :]
        retained = [file for file in newest if time.time() - modified[file] < self._seconds]
        for file in set(modified) - {*retained, self._path}:
            file.unlink(missing_ok=True)


class OtlpSink:
    """Writer of one OpenTelemetry span per request, in the trace of its `traceparent` header.

    Args:
        endpoint: HTTP URL of the collector.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "trimtab"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer, self._propagator = self._provider.get_tracer("trimtab"), TraceContextTextMapPropagator()

    def __call__(self, record: AccessRecord) -> None:
        """Create a span; spans are sent in batches."""
        context = self._propagator.extract({"traceparent": record.parent}) if record.parent else None
        attributes = build_attributes(record)
        span = self._tracer.start_span(f"POST {record.path}", context, SpanKind.SERVER, attributes, start_time=record.began)
        if record.status >= FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(record.ended)

    def flush(self) -> None:
        """Send the pending spans."""
        self._provider.force_flush(int(STOP_SECONDS * 1000))


class MlflowSink:
    """Writer of MLflow traces for a random share of the requests, in the experiment of the jobs.

    Args:
        share: share of the requests, from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._traces: RequestTraces | None = None

    def flush(self) -> None:
        """Wait until all traces are sent."""
        if self._traces is not None:
            self._traces.flush()

    def __call__(self, record: AccessRecord) -> None:
        """Log a trace with probability `share`."""
        if random.random() >= self._share:
            return
        inputs = {"id": record.id} | ({} if record.text is None else {"request": record.text})
        failed = record.status >= FAILED
        # Not in the constructor: a replica must start during an outage of MLflow.
        self._traces = self._traces or RequestTraces()
        attributes = build_attributes(record)
        self._traces.log(record.path, inputs, attributes, record.began, record.ended, failed=failed, server_id=record.server_id)


def build_attributes(record: AccessRecord) -> dict[str, str | int | float]:
    """Return the span attributes of a request, with OpenTelemetry's semantic names if they exist."""
    attributes: dict[str, str | int | float] = {"http.response.status_code": record.status, "url.path": record.path}
    names = {"model": "gen_ai.response.model", "tokens": "gen_ai.usage.output_tokens"}
    attributes |= {"trimtab.request_id": record.id} | {names.get(k, f"trimtab.{k}"): v for k, v in record.notes.items()}
    return attributes | ({} if record.first is None else {"gen_ai.server.time_to_first_token": record.first})

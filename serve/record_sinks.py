"""Where records of requests go: a log of JSON lines, an OpenTelemetry collector, and a sample of them into MLflow."""

import logging
import random
import sys
import threading
import time
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from queue import Full, Queue
from typing import Protocol

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from trimtab import settings
from trimtab.engine.metrics import UNRECORDED
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessRecord, format_record
from trimtab.tracking.client import RequestTraces

log = logging.getLogger(__name__)

MOST_WAITING = 1000
LOG_BYTES, LOG_FILES = 32 << 20, 4
# In one folder, of all replicas that there were.
MOST_FILES = 64
STOP_SECONDS = 5.0
DAY, SWEEP_SECONDS = 86_400.0, 3600.0
FAILED = 500


class RecordWriter(Protocol):
    """Takes one record at a time, and gives on what it keeps back."""

    def __call__(self, record: AccessRecord) -> None: ...

    def flush(self) -> None: ...


class RecordSinks:
    """Gives records to `takers` in a thread of its own. A full disk or a slow collector costs records, which are counted, and
    never an answer."""

    def __init__(self, takers: Sequence[RecordWriter]) -> None:
        self._takers = takers
        self._waiting: Queue[AccessRecord | None] = Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def __call__(self, record: AccessRecord) -> None:
        """Take a record; does not wait."""
        try:
            self._waiting.put_nowait(record)
        except Full:
            UNRECORDED.inc()

    def stop(self) -> None:
        """Give away what waits, for a few seconds at most."""
        try:
            self._waiting.put(None, timeout=STOP_SECONDS)
        except Full:
            return
        self._thread.join(STOP_SECONDS)
        for take in self._takers:
            take.flush()

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            for take in self._takers:
                try:
                    take(record)
                except Exception:
                    UNRECORDED.inc()
                    log.warning("a record of a request was lost", exc_info=True)


def open_sinks(config: ServeConfig, replica: str) -> RecordSinks:
    """The sinks that a server's settings ask for."""
    folder = Path(config.logs) if config.logs else settings.get_home() / "logs"
    takers: list[RecordWriter] = [LogSink(folder / f"serve-{replica}.jsonl", config.log_days)]
    takers += [OtlpSink(config.otlp)] if config.otlp else []
    takers += [MlflowSink(config.trace)] if config.trace > 0 else []
    return RecordSinks(takers)


class _Log(RotatingFileHandler):
    """A log whose losses are counted: by default it prints them, and nobody knows."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging calls it so
        """Called where an error is being handled: let it go on."""
        if (error := sys.exception()) is not None:
            raise error


class LogSink:
    """A line of JSON for each request; what is older than `days` or too much goes, of replicas before this one too."""

    def __init__(self, path: Path, days: float = 30) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._seconds = path, days * DAY
        self._swept = 0.0
        self._handler = _Log(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True)
        self.flush = self._handler.flush

    def __call__(self, record: AccessRecord) -> None:
        """Write a line."""
        if time.monotonic() - self._swept > SWEEP_SECONDS or not self._swept:
            self._sweep()
        self._handler.emit(logging.makeLogRecord({"msg": format_record(record)}))

    def _sweep(self) -> None:
        self._swept = time.monotonic()
        there = sorted(self._path.parent.glob("serve-*.jsonl*"), key=lambda old: old.stat().st_mtime)
        kept = [file for file in there[-MOST_FILES + 1 :] if time.time() - file.stat().st_mtime < self._seconds]
        for old in set(there) - {*kept, self._path}:
            old.unlink(missing_ok=True)


class OtlpSink:
    """A span for each request, in the trace that its `traceparent` names, sent over HTTP to an OpenTelemetry collector."""

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "trimtab"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer, self._propagator = self._provider.get_tracer("trimtab"), TraceContextTextMapPropagator()

    def __call__(self, record: AccessRecord) -> None:
        """Make a span; it is sent with others."""
        context = self._propagator.extract({"traceparent": record.parent}) if record.parent else None
        said = build_attributes(record)
        span = self._tracer.start_span(f"POST {record.path}", context, SpanKind.SERVER, said, start_time=record.began)
        if record.status >= FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(record.ended)

    def flush(self) -> None:
        """Send what was not sent yet."""
        self._provider.force_flush(int(STOP_SECONDS * 1000))


class MlflowSink:
    """A trace in MLflow for this share of the requests, in the experiment that jobs log to."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._traces = RequestTraces()
        self.flush = self._traces.flush

    def __call__(self, record: AccessRecord) -> None:
        """Make a trace, or not."""
        if random.random() >= self._share:
            return
        inputs = {"id": record.id} | ({} if record.text is None else {"request": record.text})
        failed = record.status >= FAILED
        self._traces.log(record.path, inputs, build_attributes(record), record.began, record.ended, failed=failed)


def build_attributes(record: AccessRecord) -> dict[str, str | int | float]:
    """What a span says of a request, in OpenTelemetry's words where there are some."""
    said: dict[str, str | int | float] = {"http.response.status_code": record.status, "url.path": record.path}
    named = {"model": "gen_ai.response.model", "tokens": "gen_ai.usage.output_tokens"}
    said |= {"trimtab.request_id": record.id} | {named.get(k, f"trimtab.{k}"): value for k, value in record.notes.items()}
    return said | ({} if record.first is None else {"gen_ai.server.time_to_first_token": record.first})

"""Sinks of access records: log files, OpenTelemetry spans and MLflow traces."""

import json
import os
import stat
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from trimtab import settings
from trimtab.detection.live_labels import LiveLabel
from trimtab.serve import record_sinks
from trimtab.serve.config import ServeConfig
from trimtab.serve.live.assessments import AssessmentSink
from trimtab.serve.middleware.access_log import AccessRecord
from trimtab.tracking.client import get_experiment_id

RECORD = AccessRecord(
    "r1", "s1", "/v1/chat/completions", 200, 1_760_000_000_000_000_000, 1_760_000_001_500_000_000, 0.2, {}, None, None
)


def test_log_has_one_json_line_per_request_and_old_files_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(record_sinks, "MOST_FILES", 3)
    for age in range(5):
        old = tmp_path / f"serve-old{age}.jsonl"
        old.write_text("{}")
        os.utime(old, (time.time() - age, time.time() - age))
    sinks = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path)), "abc")
    sinks(RECORD)
    sinks(RECORD)
    sinks.stop()
    lines = [json.loads(line) for line in (tmp_path / "serve-abc.jsonl").read_text().splitlines()]
    assert {path.name for path in tmp_path.iterdir()} == {"serve-abc.jsonl", "serve-old0.jsonl", "serve-old1.jsonl"}
    assert lines[0] == lines[1]
    assert lines[0]["at"] == "2025-10-09T08:53:20.000Z"
    assert (lines[0]["id"], lines[0]["seconds"], lines[0]["first"]) == ("r1", 1.5, 0.2)


def test_log_is_for_its_owner_only(tmp_path):
    sinks = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path / "logs")), "abc")
    sinks(RECORD)
    sinks.stop()
    assert stat.S_IMODE((tmp_path / "logs" / "serve-abc.jsonl").stat().st_mode) == 0o600


def test_one_replica_uses_the_whole_folder_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(record_sinks, "LOG_BYTES", 400)
    monkeypatch.setattr(record_sinks, "MOST_FILES", 6)
    sink = record_sinks.LogSink(tmp_path / "serve-abc.jsonl")
    for _ in range(60):
        sink(RECORD)
    assert len(list(tmp_path.iterdir())) == 6


def test_replica_starts_without_log_folder_and_mlflow(tmp_path, monkeypatch):
    """Records are lost and counted; answers are not affected."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = record_sinks.UNRECORDED._value.get()
    sinks = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path / "file" / "logs"), trace_sampling_ratio=1), "abc")
    sinks(RECORD)
    sinks.stop()
    assert record_sinks.UNRECORDED._value.get() == before + 2


def test_removes_log_files_after_retention_days(tmp_path):
    ages = {"fresh": 1, "stale": 3}
    for name, days in ages.items():
        (tmp_path / f"serve-{name}.jsonl.1").write_text("{}")
        os.utime(tmp_path / f"serve-{name}.jsonl.1", (time.time() - days * 86_400,) * 2)
    sinks = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path), log_retention_days=2), "abc")
    sinks(RECORD)
    sinks.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"serve-abc.jsonl", "serve-fresh.jsonl.1"}


def test_slow_failing_sink_drops_records_without_blocking(monkeypatch):
    monkeypatch.setattr(record_sinks, "MOST_WAITING", 2)
    monkeypatch.setattr(record_sinks, "STOP_SECONDS", 0.1)
    release, records = threading.Event(), []

    class FailingSink:
        def __call__(self, record):
            release.wait(30)
            records.append(record)
            raise OSError("the disk is full")

        def flush(self):
            return

    sinks = record_sinks.RecordSinks([FailingSink()])
    for _ in range(10):
        sinks(RECORD)
    release.set()
    sinks.stop()
    assert 2 <= len(records) <= 4


def test_otlp_span_has_trace_id_of_client():
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            return

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sink = record_sinks.OtlpSink(f"http://127.0.0.1:{server.server_port}/v1/traces")
    trace = "0af7651916cd43dd8448eb211c80319c"
    notes = {"model": "m@1", "risk": 0.5}
    sink(AccessRecord("r1", "s1", "/p", 200, 10**18, 2 * 10**18, 0.2, notes, None, f"00-{trace}-b7ad6b7169203331-01"))
    sink.flush()
    server.shutdown()
    (span,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans[0].scope_spans[0].spans
    assert span.trace_id.hex() == trace
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (10**18, 2 * 10**18)
    attributes = {attribute.key: attribute.value for attribute in span.attributes}
    assert attributes["gen_ai.response.model"].string_value == "m@1"
    assert attributes["trimtab.risk"].double_value == 0.5


def test_mlflow_sink_samples_traces_and_adds_labels(home):
    sampling_all = record_sinks.MlflowSink(1.0)
    sampling_all(RECORD)
    sampling_all.flush()
    client = mlflow.MlflowClient(settings.get_tracking_uri())
    (trace,) = client.search_traces(locations=[get_experiment_id()])
    assert trace.info.request_time == RECORD.began // 10**6
    assert trace.data.spans[0].attributes["trimtab.request_id"] == "r1"
    assess = AssessmentSink()
    assess(LiveLabel(RECORD.server_id, 0, False, "ann", True, 0.0))
    assess(LiveLabel("no such request", 0, True, "ann", True, 0.0))
    assess.stop()
    (labeled,) = client.search_traces(locations=[get_experiment_id()])
    (feedback,) = labeled.info.assessments
    assert (feedback.name, feedback.value, feedback.source.source_id) == ("correct", False, "ann")
    sampling_none = record_sinks.MlflowSink(0.0)
    sampling_none(RECORD)
    sampling_none.flush()
    assert len(client.search_traces(locations=[get_experiment_id()])) == 1

"""The doors in front of a replica's engine: how many may come in, how long they may stay, and what is kept of them."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from trimtab import settings
from trimtab.serve import record_sinks
from trimtab.serve.config import ServeConfig
from trimtab.serve.middleware.access_log import AccessRecord
from trimtab.tracking.client import get_experiment_id

RECORD = AccessRecord(
    "r1", "/v1/chat/completions", 200, 1_760_000_000_000_000_000, 1_760_000_001_500_000_000, 0.2, {}, None, None
)


def test_a_line_of_json_for_each_request(tmp_path, monkeypatch):
    monkeypatch.setattr(record_sinks, "MOST_FILES", 3)
    for age in range(5):
        old = tmp_path / f"serve-old{age}.jsonl"
        old.write_text("{}")
        os.utime(old, (time.time() - age, time.time() - age))
    taken = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path)), "abc")
    taken(RECORD)
    taken(RECORD)
    taken.stop()
    lines = [json.loads(line) for line in (tmp_path / "serve-abc.jsonl").read_text().splitlines()]
    assert {path.name for path in tmp_path.iterdir()} == {"serve-abc.jsonl", "serve-old0.jsonl", "serve-old1.jsonl"}
    assert lines[0] == lines[1]
    assert lines[0]["at"] == "2025-10-09T08:53:20.000Z"
    assert (lines[0]["id"], lines[0]["seconds"], lines[0]["first"]) == ("r1", 1.5, 0.2)


def test_lines_are_kept_for_some_days(tmp_path):
    ages = {"fresh": 1, "stale": 3}
    for name, days in ages.items():
        (tmp_path / f"serve-{name}.jsonl.1").write_text("{}")
        os.utime(tmp_path / f"serve-{name}.jsonl.1", (time.time() - days * 86_400,) * 2)
    taken = record_sinks.open_sinks(ServeConfig(log_dir=str(tmp_path), log_retention_days=2), "abc")
    taken(RECORD)
    taken.stop()
    assert {path.name for path in tmp_path.iterdir()} == {"serve-abc.jsonl", "serve-fresh.jsonl.1"}


def test_a_sink_that_fails_or_hangs_costs_records_only(monkeypatch):
    monkeypatch.setattr(record_sinks, "MOST_WAITING", 2)
    monkeypatch.setattr(record_sinks, "STOP_SECONDS", 0.1)
    opened, kept = threading.Event(), []

    class Full:
        def __call__(self, record):
            opened.wait(30)
            kept.append(record)
            raise OSError("the disk is full")

        def flush(self):
            return

    taken = record_sinks.RecordSinks([Full()])
    for _ in range(10):
        taken(RECORD)
    opened.set()
    taken.stop()
    assert 2 <= len(kept) <= 4


def test_spans_reach_a_collector_in_the_trace_that_the_client_names():
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            return

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    take = record_sinks.OtlpSink(f"http://127.0.0.1:{server.server_port}/v1/traces")
    trace = "0af7651916cd43dd8448eb211c80319c"
    notes = {"model": "m@1", "risk": 0.5}
    take(AccessRecord("r1", "/p", 200, 10**18, 2 * 10**18, 0.2, notes, None, f"00-{trace}-b7ad6b7169203331-01"))
    take.flush()
    server.shutdown()
    (span,) = ExportTraceServiceRequest.FromString(got[0]).resource_spans[0].scope_spans[0].spans
    assert span.trace_id.hex() == trace
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (10**18, 2 * 10**18)
    said = {a.key: a.value for a in span.attributes}
    assert said["gen_ai.response.model"].string_value == "m@1"
    assert said["trimtab.risk"].double_value == 0.5


def test_a_share_of_the_requests_leaves_a_trace_in_mlflow(home):
    whole = record_sinks.MlflowSink(1.0)
    whole(RECORD)
    whole.flush()
    client = mlflow.MlflowClient(settings.get_tracking_uri())
    (trace,) = client.search_traces(locations=[get_experiment_id()])
    assert trace.info.request_time == RECORD.began // 10**6
    assert trace.data.spans[0].attributes["trimtab.request_id"] == "r1"
    none = record_sinks.MlflowSink(0.0)
    none(RECORD)
    none.flush()
    assert len(client.search_traces(locations=[get_experiment_id()])) == 1

"""Settings of `trimtab serve`."""

import re
from dataclasses import dataclass, field

from trimtab.engine.config import EngineConfig
from trimtab.engine.openai.routing import TrafficSplit
from trimtab.errors import UsageError
from trimtab.types import DEFAULT_BASE

HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and the champions of its prefixes over the OpenAI API.

    Args:
        model: base model: catalog name, folder, or Hugging Face id.
        revision: revision of the Hugging Face model.
        host: address to listen on; the loopback address by default.
        port: port to listen on.
        replicas: number of replicas, each with an engine and every champion.
        most_replicas: maximum number of replicas under load; autoscaling is on if this is above `replicas`.
        target_requests: target number of running and queued requests per replica; autoscaling adds replicas above it.
        up_seconds: time above the target before a replica is added (seconds).
        down_seconds: time below the target before a replica is stopped (seconds).
        affinity: request header whose value selects the replica, such as x-session-id, so that a conversation hits the prefix
            cache; by default the least loaded replica answers.
        cpus: CPU cores for each replica; 0 divides the cores of this machine among the replicas.
        gpus: GPUs for each replica.
        requests: number of requests that one replica should run at the same time.
        queue: maximum number of queued requests per replica; further requests are answered 503.
        request_seconds: time limit of a complete response, or of the start of a stream (seconds).
        stream_seconds: time limit of a stream (seconds).
        drain_seconds: time for running requests to finish when a replica is stopped (seconds).
        start_seconds: time limit of the start of the replicas (seconds).
        address: address of the Ray cluster to serve on; by default a local Ray is started.
        registry: folder to use instead of the MLflow registry: NAME/VERSION/ is a saved prefix or detector, and
            NAME/aliases.json maps aliases to versions, such as {"champion": 2}.
        key_file: file of API keys from `trimtab keys add`; by default the one in trimtab's home, if it exists. If the file
            has keys, every request needs one.
        open: serve without API keys on an address that is not loopback.
        detect: score answers with the detectors of the registry, if it has any; this costs about one twentieth of the
            throughput.
        detector: default detector for requests that name none: NAME, NAME@ALIAS or NAME@VERSION; by default the champion that
            was trained under the prefix of the request, else the only champion.
        traffic: traffic shares by alias for requests that name a prefix without an alias, such as
            {"mine": {"champion": 95, "candidate": 5}}; requests with the same `user` get the same version.
        shadow: alias of a prefix that gets a copy of the prefix's requests, such as {"mine": "candidate"}; its answers are
            discarded.
        logs: folder of the request logs, one JSON line per request; by default in trimtab's home.
        log_days: age at which logs are removed (days), and thus how long `trimtab lineage` finds a response by its id; logs
            above 64 files of 32 MiB are removed earlier.
        log_text: include the text of requests in logs and traces.
        otlp: URL of an OpenTelemetry collector that receives a span per request, such as http://localhost:4318/v1/traces.
        trace: share of the requests that are traced in MLflow, from 0 to 1.
        engine: settings of the engine in each replica.
    """

    model: str = DEFAULT_BASE
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    most_replicas: int = 0
    target_requests: float = 32
    up_seconds: float = 30
    down_seconds: float = 600
    affinity: str | None = None
    cpus: float = 0
    gpus: float = 0
    requests: int = 128
    queue: int = 256
    request_seconds: float = 600
    stream_seconds: float = 3600
    drain_seconds: float = 60
    start_seconds: float = 600
    address: str | None = None
    registry: str | None = None
    key_file: str | None = None
    open: bool = False
    detect: bool = True
    detector: str | None = None
    traffic: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    shadow: dict[str, str] = field(default_factory=dict[str, str])
    logs: str | None = None
    log_days: float = 30
    log_text: bool = False
    otlp: str | None = None
    trace: float = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.requests < 1 or self.queue < 0:
            raise UsageError("replicas and requests must be at least 1, queue at least 0")
        if min(self.request_seconds, self.stream_seconds, self.target_requests, self.log_days) <= 0 or self.drain_seconds < 0:
            raise UsageError(
                "request_seconds, stream_seconds, target_requests and log_days must be above 0, drain_seconds at least 0"
            )
        if self.affinity is not None and not HEADER.fullmatch(self.affinity):
            raise UsageError(f"affinity must be a header name, not {self.affinity!r}")
        if not 0 <= self.trace <= 1:
            raise UsageError(f"trace must be from 0 to 1, not {self.trace}")
        # Validates the shares.
        TrafficSplit(self.traffic, self.shadow)

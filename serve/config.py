"""Settings of `trimtab serve`."""

import re
from dataclasses import dataclass, field
from typing import Any

from trimtab.engine.config import EngineConfig
from trimtab.engine.openai.traffic_split import TrafficSplit
from trimtab.engine.policies import parse_policies
from trimtab.errors import UsageError
from trimtab.types import DEFAULT_BASE, SUBJECTS, Subject

HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and its prefixes over the OpenAI API.

    Args:
        base: base model: catalog name, folder, or Hugging Face id.
        revision: revision of the Hugging Face model.
        host: address to listen on; the loopback address by default.
        port: port to listen on.
        num_replicas: number of replicas, each with an engine and every champion.
        max_replicas: maximum number of replicas under load; autoscaling is on if this is above `num_replicas`.
        target_ongoing_requests: target number of running and queued requests per replica; autoscaling adds replicas above it.
        upscale_delay_s: time above the target before a replica is added (seconds).
        downscale_delay_s: time below the target before a replica is stopped (seconds).
        affinity_header: request header whose value selects the replica, such as x-session-id, so that a conversation hits the
            prefix cache; by default the least loaded replica answers.
        cpus_per_replica: CPU cores for each replica; 0 divides the cores of this machine among the replicas.
        gpus_per_replica: GPUs for each replica.
        max_ongoing_requests: number of requests that one replica should run at the same time.
        max_queued_requests: maximum number of queued requests per replica; further requests are answered 503.
        max_concurrent_per_key: maximum number of concurrent requests per replica of an API key without a limit of its own;
            0 for half of the running and queued requests, so that no key can exclude the others.
        share_cache: let API keys share the KV cache. By default each key has its own, because the time to the first token
            reveals whether another key has sent the same text.
        request_timeout_s: time limit of a complete response, or of the start of a stream (seconds).
        stream_timeout_s: time limit of a stream (seconds).
        drain_seconds: time for running requests to finish when a replica is stopped (seconds).
        startup_timeout_s: time limit of the start of the replicas (seconds).
        address: address of the Ray cluster to serve on; by default a local Ray is started.
        registry: folder to use instead of the MLflow registry: NAME/VERSION/ is a saved prefix or detector, and
            NAME/aliases.json maps aliases to versions, such as {"champion": 2}.
        api_key_file: file of API keys from `trimtab keys add`; by default the one in trimtab's home, if it exists. If the file
            has keys, every request needs one.
        allow_unauthenticated: serve without API keys on an address that is not loopback.
        detect: score answers with the detectors of the registry, if it has any; this costs about one twentieth of the
            throughput.
        detector: default detector for requests that name none: NAME, NAME@ALIAS or NAME@VERSION; by default the champion that
            was trained under the prefix of the request, else the only champion.
        traffic: traffic shares by alias for requests that name a prefix without an alias, such as
            {"mine": {"champion": 95, "candidate": 5}}; requests with the same `user` get the same version.
        shadow: alias of a prefix that gets a copy of the prefix's requests, such as {"mine": "candidate"}; its answers are
            discarded.
        policies: policies of all requests, in JSON or YAML, such as [{"detector": "guard", "action": "refuse"}];
            the strictest triggered action wins, so that an API key or a request can only add to them.
        log_dir: folder of the request logs, one JSON line per request; by default in trimtab's home.
        log_retention_days: age at which logs are removed (days), and thus how long `trimtab lineage` finds a response by its
            id; logs above 64 files of 32 MiB are removed earlier.
        log_text: include the text of requests in logs and traces.
        otlp_traces_endpoint: URL of an OpenTelemetry collector that receives a span per request, such as http://localhost:4318/v1/traces.
        trace_sampling_ratio: share of the requests that are traced in MLflow, from 0 to 1.
        engine: settings of the engine in each replica.
        keep_signals: folder or bucket to store the signals of prompts and answers in, to train detectors on them with the
            labels of `POST /v1/feedback`; neither text nor token ids are stored. By default nothing is stored.
        signals_sampling_ratio: share of the requests whose signals are stored, from 0 to 1.
        signals_retention_days: age at which stored signals are removed (days).
        signals_max_bytes: size of all stored signals above which the oldest are removed (bytes).
        signals_flush_s: time after which the signals of a request are written (seconds); a crash loses those that wait.
        signals_history: store the statistics of each token as well, which the head flag reads.
        signals_subjects: signals to store; answer, prompt or both.
    """

    base: str = DEFAULT_BASE
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    num_replicas: int = 1
    max_replicas: int = 0
    target_ongoing_requests: float = 32
    upscale_delay_s: float = 30
    downscale_delay_s: float = 600
    affinity_header: str | None = None
    cpus_per_replica: float = 0
    gpus_per_replica: float = 0
    max_ongoing_requests: int = 128
    max_queued_requests: int = 256
    max_concurrent_per_key: int = 0
    share_cache: bool = False
    request_timeout_s: float = 600
    stream_timeout_s: float = 3600
    drain_seconds: float = 60
    startup_timeout_s: float = 600
    address: str | None = None
    registry: str | None = None
    api_key_file: str | None = None
    allow_unauthenticated: bool = False
    detect: bool = True
    detector: str | None = None
    traffic: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    shadow: dict[str, str] = field(default_factory=dict[str, str])
    policies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    log_dir: str | None = None
    log_retention_days: float = 30
    log_text: bool = False
    otlp_traces_endpoint: str | None = None
    trace_sampling_ratio: float = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    keep_signals: str | None = None
    signals_sampling_ratio: float = 1.0
    signals_retention_days: float = 30
    signals_max_bytes: int = 10 << 30
    signals_flush_s: float = 30
    signals_history: bool = True
    signals_subjects: list[Subject] = field(default_factory=lambda: list(SUBJECTS))

    def __post_init__(self) -> None:
        if ":" in self.host:
            raise UsageError(f"host must be a name or an IPv4 address, not {self.host!r}. IPv6 is not supported")
        if self.num_replicas < 1 or self.max_ongoing_requests < 1:
            raise UsageError("num_replicas and max_ongoing_requests must be at least 1")
        if self.max_queued_requests < 0 or self.max_concurrent_per_key < 0:
            raise UsageError("max_queued_requests and max_concurrent_per_key must be at least 0")
        if (
            min(self.request_timeout_s, self.stream_timeout_s, self.target_ongoing_requests, self.log_retention_days) <= 0
            or self.drain_seconds < 0
        ):
            raise UsageError(
                "request_timeout_s, stream_timeout_s, target_ongoing_requests and log_retention_days must be above 0, "
                "drain_seconds at least 0"
            )
        if self.affinity_header is not None and not HEADER.fullmatch(self.affinity_header):
            raise UsageError(f"affinity_header must be a header name, not {self.affinity_header!r}")
        if not 0 <= self.trace_sampling_ratio <= 1:
            raise UsageError(f"trace_sampling_ratio must be from 0 to 1, not {self.trace_sampling_ratio}")
        if not 0 < self.signals_sampling_ratio <= 1:
            raise UsageError(f"signals_sampling_ratio must be above 0 and at most 1, not {self.signals_sampling_ratio}")
        if min(self.signals_retention_days, self.signals_max_bytes, self.signals_flush_s) <= 0:
            raise UsageError("signals_retention_days, signals_max_bytes and signals_flush_s must be above 0")
        if self.keep_signals is not None and not (self.detect and self.signals_subjects):
            raise UsageError(
                "keep_signals needs detect and at least one of signals_subjects. Remove --detect false, or set one"
            )
        # Validates the shares and the policies.
        TrafficSplit(self.traffic, self.shadow)
        if parse_policies(self.policies, "policies") and not self.detect:
            raise UsageError("policies need detectors. Remove --detect false")

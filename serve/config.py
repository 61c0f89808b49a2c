"""Settings of the server."""

import re
from dataclasses import dataclass, field

from trimtab.engine.config import EngineConfig
from trimtab.engine.openai.routing import TrafficSplit
from trimtab.errors import UsageError

HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and every champion of its prefixes, over the OpenAI API.

    Args:
        model: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        host: address to listen on; loopback unless you say otherwise.
        port: port to listen on.
        replicas: engines that share the load; each holds every champion.
        most_replicas: where above `replicas`, so many are started where there is more to do, and stopped again.
        target_requests: requests, running and waiting, that a replica should have; with more of them, replicas are added.
        up_seconds: how long there must be too much to do before a replica is added.
        down_seconds: how long there must be too little before one is stopped.
        affinity: header whose value chooses the replica, as x-session-id, so that a conversation finds its prompts in the
            prefix cache; without it, the replica with the least to do answers.
        cpus: CPU cores for each replica; 0 shares this machine's cores out.
        gpus: GPUs for each replica.
        requests: requests that one replica should run at the same time.
        queue: requests that may wait at one replica; more are answered 503.
        request_seconds: how long a whole answer, or the start of a stream, may take.
        stream_seconds: how long a stream may take.
        drain_seconds: how long requests may go on that run when a replica is to stop.
        start_seconds: how long a replica may take to start.
        address: Ray cluster to serve on; without one a local Ray is started.
        registry: folder in the place of MLflow's registry: NAME/VERSION/ holds a prefix or detector as trimtab saves it, and
            NAME/aliases.json says which version each alias names, as {"champion": 2}.
        key_file: file of API keys that `trimtab keys add` made; without it, the one in trimtab's home, where there is one.
            Where there are keys, nobody is answered without one.
        open: answer anyone on an address that is not loopback, without keys.
        detect: watch answers with the registry's detectors, where it has any; costs about a twentieth of the speed.
        detector: detector that watches where a request names none: NAME, NAME@ALIAS or NAME@VERSION; without it, the champion
            that was fitted under the request's prefix, else the only champion.
        traffic: shares by alias of the requests that name a prefix without one, as {"mine": {"champion": 95, "candidate": 5}};
            who sends the same `user` stays with a version.
        shadow: alias of a prefix that is asked the same beside its answers, which nobody gets, as {"mine": "candidate"}.
        logs: folder of logs with a line of JSON for each request; without it, one in trimtab's home.
        log_days: how long logs are kept, and so how long `trimtab lineage` finds a response by its id; sooner where they grow
            beyond 64 files of 32 MiB.
        log_text: put what requests said into logs and traces as well.
        otlp: OpenTelemetry collector that gets a span for each request, as http://localhost:4318/v1/traces.
        trace: share of the requests that leave a trace in MLflow, from 0 to 1.
        engine: the engine in each replica.
    """

    model: str = "smollm2-135m"
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
            raise UsageError("replicas and requests must be at least 1, queue not below 0")
        if min(self.request_seconds, self.stream_seconds, self.target_requests, self.log_days) <= 0 or self.drain_seconds < 0:
            raise UsageError(
                "request_seconds, stream_seconds, target_requests and log_days must be above 0, drain_seconds not below"
            )
        if self.affinity is not None and not HEADER.fullmatch(self.affinity):
            raise UsageError(f"affinity must be the name of a header, not {self.affinity!r}")
        if not 0 <= self.trace <= 1:
            raise UsageError("trace is a share of the requests, from 0 to 1")
        # Raises for shares that say nothing.
        TrafficSplit(self.traffic, self.shadow)

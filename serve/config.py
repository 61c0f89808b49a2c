"""Settings of the server."""

from dataclasses import dataclass, field

from trimtab.engine.config import EngineConfig
from trimtab.engine.traffic import Traffic


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and every champion of its prefixes, over the OpenAI API.

    Args:
        model: base model: catalogue name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        host: address to listen on; loopback unless you say otherwise.
        port: port to listen on.
        replicas: engines that share the load; each holds every champion.
        cpus: CPU cores for each replica; 0 shares this machine's cores out.
        gpus: GPUs for each replica.
        requests: requests that one replica takes at the same time; more wait.
        queue: requests that may wait in all; more are answered 503.
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
        engine: the engine in each replica.
    """

    model: str = "smollm2-135m"
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 0
    gpus: float = 0
    requests: int = 128
    queue: int = 256
    start_seconds: float = 600
    address: str | None = None
    registry: str | None = None
    key_file: str | None = None
    open: bool = False
    detect: bool = True
    detector: str | None = None
    traffic: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    shadow: dict[str, str] = field(default_factory=dict[str, str])
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        # Raises for shares that say nothing.
        Traffic(self.traffic, self.shadow)

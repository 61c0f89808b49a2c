"""What a server counts of its own, in Prometheus' words, beside the engine's metrics at `/metrics`."""

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

# Whoever starts a server counts nothing, and does without vLLM.
if TYPE_CHECKING:
    from trimtab.engine.detectors.request_risk import Watch
    from trimtab.engine.prefixes.catalog import Aliases
    from trimtab.engine.prefixes.token_guard import Steering

# From a tenth of what a GPU needs for a token to what a busy CPU does.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STEERED = ("prefix", "version", "mode")
NONE = ("none", "0")

REQUESTS = Counter("trimtab_requests", "Requests for answers and scores, by what steered them.", (*STEERED, "status"))
TOKENS = Counter("trimtab_tokens", "Tokens written, by what steered them.", STEERED)
FIRST = Histogram("trimtab_first_token_seconds", "Time to the first token of streams.", STEERED, buckets=SECONDS)
NEXT = Histogram("trimtab_next_token_seconds", "Time between pieces of streams.", STEERED, buckets=SECONDS)
RISKS = [step / 20 for step in range(1, 21)]
WATCHED = (*STEERED, "detector", "detector_version")
RISK = Histogram("trimtab_risk", "Risk that an answer is made up.", WATCHED, buckets=RISKS)
UNCHECKED = Counter("trimtab_unchecked", "Answers that no detector checked.", (*STEERED, "status"))
ROWS = Gauge("trimtab_rows_taken", "Rows of the vocabulary that hold prefixes.")
REFRESHED = Gauge("trimtab_registry_read_seconds", "When the registry was last read, in seconds since 1970.")
ALIAS = ("kind", "name", "alias")
POINTED = Gauge("trimtab_alias_version", "The version that an alias answers with.", ALIAS)
MOVED = Gauge("trimtab_alias_moved_seconds", "When an alias was last moved here, in seconds since 1970.", ALIAS)
REFUSED = Gauge("trimtab_versions_refused", "Versions with an alias that could not be used.")
UNRECORDED = Counter("trimtab_records_lost", "Requests that neither log nor trace has.")


def steered(now: "Steering | None", watch: "Watch | None") -> tuple[str, str, str]:
    """The labels of what steers a request; `mode` is answer, or shadow where nobody gets it."""
    name, version = (now.name, str(now.version)) if now else NONE
    return name, version, "shadow" if watch and watch.shadow else "answer"


def risk(labels: tuple[str, str, str], watch: "Watch", index: int) -> None:
    """Count an answer that has ended."""
    if watch.detector is None or index not in watch.risks:
        UNCHECKED.labels(*labels, watch.status if watch.detector is None else "unavailable").inc()
        return
    known = watch.detector.known
    RISK.labels(*labels, known.name, str(known.version)).observe(watch.risks[index])


def pointed(kind: str, before: "Aliases", now: "Aliases") -> None:
    """Say which versions aliases answer with, where that is not as before."""
    for key in before.keys() - now.keys():
        POINTED.remove(kind, *key)
        MOVED.remove(kind, *key)
    for key, version in now.items():
        if before.get(key) != version:
            POINTED.labels(kind, *key).set(version)
            MOVED.labels(kind, *key).set_to_current_time()

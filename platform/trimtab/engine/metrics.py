"""What a server counts of its own, in Prometheus' words, beside the engine's metrics at `/metrics`."""

from collections.abc import Mapping
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from trimtab.engine.context import Steering

AliasVersions = Mapping[tuple[str, str], int]
"""Versions by name and alias."""


class NamedVersion(Protocol):
    """Name and version of a registered artifact."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


# From a tenth of what a GPU needs for a token to what a busy CPU does.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PREFIX_LABELS = ("prefix", "version", "mode")
NONE = ("none", "0")

REQUESTS = Counter("trimtab_requests", "Requests for answers and scores, by what steered them.", (*PREFIX_LABELS, "status"))
TOKENS = Counter("trimtab_tokens", "Tokens written, by what steered them.", PREFIX_LABELS)
FIRST = Histogram("trimtab_first_token_seconds", "Time to the first token of streams.", PREFIX_LABELS, buckets=SECONDS)
NEXT = Histogram("trimtab_next_token_seconds", "Time between pieces of streams.", PREFIX_LABELS, buckets=SECONDS)
RISKS = [step / 20 for step in range(1, 21)]
RISK_LABELS = (*PREFIX_LABELS, "detector", "detector_version")
RISK = Histogram("trimtab_risk", "Risk that an answer is made up.", RISK_LABELS, buckets=RISKS)
UNCHECKED = Counter("trimtab_unchecked", "Answers that no detector checked.", (*PREFIX_LABELS, "status"))
ROWS = Gauge("trimtab_rows_taken", "Rows of the vocabulary that hold prefixes.")
REFRESHED = Gauge("trimtab_registry_read_seconds", "When the registry was last read, in seconds since 1970.")
ALIAS = ("kind", "name", "alias")
ALIAS_VERSION = Gauge("trimtab_alias_version", "The version that an alias answers with.", ALIAS)
ALIAS_MOVED = Gauge("trimtab_alias_moved_seconds", "When an alias was last moved here, in seconds since 1970.", ALIAS)
VERSIONS_REFUSED = Gauge("trimtab_versions_refused", "Versions with an alias that could not be used.")
UNRECORDED = Counter("trimtab_records_lost", "Requests that neither log nor trace has.")


def request_labels(steering: Steering | None, *, shadow: bool = False) -> tuple[str, str, str]:
    """Return the labels of a request: prefix, version, and the mode `answer` or `shadow`."""
    name, version = (steering.name, str(steering.version)) if steering else NONE
    return name, version, "shadow" if shadow else "answer"


def count_risk(labels: tuple[str, str, str], detector: NamedVersion | None, risk: float | None, status: str) -> None:
    """Count an answer that has ended. `status` says why there is no risk."""
    if detector is None or risk is None:
        UNCHECKED.labels(*labels, status).inc()
        return
    RISK.labels(*labels, detector.name, str(detector.version)).observe(risk)


def set_alias_versions(kind: str, before: AliasVersions, now: AliasVersions) -> None:
    """Set the version of each alias that moved; remove the series of aliases that are gone."""
    for key in before.keys() - now.keys():
        ALIAS_VERSION.remove(kind, *key)
        ALIAS_MOVED.remove(kind, *key)
    for key, version in now.items():
        if before.get(key) != version:
            ALIAS_VERSION.labels(kind, *key).set(version)
            ALIAS_MOVED.labels(kind, *key).set_to_current_time()

"""Prometheus metrics of trimtab, exported at `/metrics` beside those of vLLM."""

from collections.abc import Mapping
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from trimtab.engine.context import Steering

AliasVersions = Mapping[tuple[str, str], int]
"""Version numbers by (name, alias)."""


class NamedVersion(Protocol):
    """Name and version of a registered artifact."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...


# From a tenth of the time per token on a GPU to the time per token on a busy CPU.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PREFIX_LABELS = ("prefix", "version", "mode")
NONE = ("none", "0")

REQUESTS = Counter("trimtab_requests", "Requests for answers and scores, by prefix.", (*PREFIX_LABELS, "status"))
TOKENS = Counter("trimtab_tokens", "Tokens generated, by prefix.", PREFIX_LABELS)
FIRST = Histogram(
    "trimtab_first_token_seconds", "Time to the first token of a stream, in seconds.", PREFIX_LABELS, buckets=SECONDS
)
NEXT = Histogram(
    "trimtab_next_token_seconds", "Time between two outputs of a stream, in seconds.", PREFIX_LABELS, buckets=SECONDS
)
RISKS = [step / 20 for step in range(1, 21)]
RISK_LABELS = (*PREFIX_LABELS, "detector", "detector_version")
RISK = Histogram("trimtab_risk", "Risk that an answer is made up, from 0 to 1.", RISK_LABELS, buckets=RISKS)
UNCHECKED = Counter("trimtab_unchecked", "Answers without a risk from a detector.", (*PREFIX_LABELS, "status"))
VERDICTS = Counter(
    "trimtab_policy_verdicts",
    "Verdicts of policies on prompts: the action that was triggered, none, or unchecked.",
    (*PREFIX_LABELS, "detector", "detector_version", "action"),
)
DRIFT = Gauge(
    "trimtab_detector_drift",
    "Evidence that the risks of answers differ from those on the card of the detector; an alarm at 1.",
    ("detector", "detector_version"),
)
SLOTS_USED = Gauge("trimtab_slots_used", "Slots that hold prefixes.")
PREFIX_WRITES = Counter("trimtab_prefix_writes", "Prefixes written into slots: each was in no slot before.")
REFRESHED = Gauge("trimtab_registry_read_seconds", "Time of the last read of the registry, in seconds since 1970.")
ALIAS = ("kind", "name", "alias")
ALIAS_VERSION = Gauge("trimtab_alias_version", "Version that an alias resolves to.", ALIAS)
ALIAS_MOVED = Gauge("trimtab_alias_moved_seconds", "Time when this replica last moved the alias, in seconds since 1970.", ALIAS)
VERSIONS_REFUSED = Gauge("trimtab_versions_refused", "Versions with an alias that could not be loaded.")
MALFORMED_REQUESTS = Counter(
    "trimtab_malformed_requests", "Requests that vLLM could not parse, by error type; answered with status 400.", ("error",)
)
INTERNAL_ERRORS = Counter("trimtab_internal_errors", "Errors of vLLM, by type; answered with status 500.", ("error",))
SIGNALS_STORED = Counter("trimtab_signals_stored", "Answers whose signals were stored.")
SIGNALS_LOST = Counter("trimtab_signals_lost", "Answers whose signals were dropped or could not be stored.")
FEEDBACK = Counter("trimtab_feedback", "Labels that were stored, by whether the answer is right.", ("correct",))
UNRECORDED = Counter("trimtab_records_lost", "Requests that were written to neither log nor trace.")


def request_labels(steering: Steering | None, *, shadow: bool = False) -> tuple[str, str, str]:
    """Return the metric labels of a request.

    Args:
        steering: prefix of the request; None for the plain base model.
        shadow: whether the request is shadow traffic.

    Returns:
        Prefix name, version, and mode (`answer` or `shadow`).
    """
    name, version = (steering.name, str(steering.version)) if steering else NONE
    return name, version, "shadow" if shadow else "answer"


def count_risk(labels: tuple[str, str, str], detector: NamedVersion | None, risk: float | None, status: str) -> None:
    """Record the risk of an answer that has ended, or count it as unchecked.

    Args:
        labels: labels of the request, from `request_labels`.
        detector: detector that checked the answer; None if there is none.
        risk: risk of the answer, from 0 to 1; None if it is unknown.
        status: reason for an unknown risk, recorded as a label.
    """
    if detector is None or risk is None:
        UNCHECKED.labels(*labels, status).inc()
        return
    RISK.labels(*labels, detector.name, str(detector.version)).observe(risk)


def count_verdict(labels: tuple[str, str, str], detector: NamedVersion | None, action: str) -> None:
    """Count the verdict of a policy on the prompt of an answer that has ended.

    Args:
        labels: labels of the request, from `request_labels`.
        detector: detector of the policy; None if it is not available.
        action: action that was triggered; `none` if there was none, and `unchecked` if the risk is unknown.
    """
    name, version = (detector.name, str(detector.version)) if detector else NONE
    VERDICTS.labels(*labels, name, version, action).inc()


def set_alias_versions(kind: str, before: AliasVersions, after: AliasVersions) -> None:
    """Set the version of each alias that moved, and remove the series of deleted aliases.

    Args:
        kind: `prefix` or `detector`.
        before: versions before the refresh.
        after: versions after the refresh.
    """
    for key in before.keys() - after.keys():
        ALIAS_VERSION.remove(kind, *key)
        ALIAS_MOVED.remove(kind, *key)
    for key, version in after.items():
        if before.get(key) != version:
            ALIAS_VERSION.labels(kind, *key).set(version)
            ALIAS_MOVED.labels(kind, *key).set_to_current_time()


def remove_version_series(kind: str, name: str, version: int) -> None:
    """Remove the metric series of a version that is no longer in memory, so that their number stays bounded.

    Args:
        kind: `prefix` or `detector`.
        name: name of the prefix or detector.
        version: version number.
    """
    if kind == "detector":
        for metric in (RISK, VERDICTS, DRIFT):
            metric.remove_by_labels({"detector": name, "detector_version": str(version)})
        return
    for metric in (REQUESTS, TOKENS, FIRST, NEXT, RISK, UNCHECKED, VERDICTS):
        metric.remove_by_labels({"prefix": name, "version": str(version)})

"""Monitors of the risks of live traffic: one sequential test per detector, against the risks that its card records."""

from typing import Any

from trimtab.detection.detector import Detector
from trimtab.engine.metrics import DRIFT
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.stats.change_detection import ChangeMonitor

# Lower bound of the mean number of answers until a false alarm.
RUN_LENGTH = 10_000.0
# Reference risks that a monitor needs, and detectors that are monitored at the same time.
MIN_REFERENCE, MOST_MONITORS = 50, 64


class DriftMonitors:
    """Monitors of the detectors of one engine, by version."""

    def __init__(self) -> None:
        self._monitors: dict[tuple[str, int], ChangeMonitor] = {}
        self._shifted: set[tuple[str, int]] = set()

    def observe_risk(self, loaded: LoadedVersion[Detector], risk: float) -> None:
        """Add the risk of a prompt or an answer. Detectors without reference risks on their cards are not monitored."""
        reference = loaded.artifact.card.reference_risks
        key = loaded.version.name, loaded.version.version
        if len(reference) < MIN_REFERENCE:
            return
        if key not in self._monitors:
            if len(self._monitors) >= MOST_MONITORS:
                self._remove(next(iter(self._monitors)))
            self._monitors[key] = ChangeMonitor(reference)
        evidence = self._monitors[key].update(risk) / RUN_LENGTH
        DRIFT.labels(key[0], str(key[1])).set(evidence)
        if evidence >= 1:
            self._shifted.add(key)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return the status of each monitored detector by NAME@VERSION, for the model list.

        `status` is `shifted` from the first alarm on, else `stable`; `answers` is their number; `evidence` is that of a change,
        with an alarm at 1.
        """
        return {
            f"{key[0]}@{key[1]}": {
                "status": "shifted" if key in self._shifted else "stable",
                "answers": monitor.count,
                "evidence": float(f"{monitor.evidence / RUN_LENGTH:.3g}"),
            }
            for key, monitor in self._monitors.items()
        }

    def _remove(self, key: tuple[str, int]) -> None:
        self._monitors.pop(key)
        self._shifted.discard(key)
        DRIFT.remove(key[0], str(key[1]))

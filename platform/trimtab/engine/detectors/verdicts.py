"""Policies with the versions of their detectors, and their verdicts on the choices of one HTTP request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from trimtab.detection.detector import Detector
from trimtab.engine.policies import DIGITS, Policy
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.types import Subject


@dataclass(frozen=True)
class AppliedPolicy:
    """Policy with the version of its detector for one request.

    Attributes:
        policy: the policy.
        detector: version of the detector; None if it is not available.
        threshold: risk that triggers the policy.
        above: whether a risk above the threshold triggers it; otherwise one that is not above.
        reason: reason for the absence of a detector.
        warning: reason why the risk may be miscalibrated.
        is_hidden: whether the response omits the policy.
    """

    policy: Policy
    detector: LoadedVersion[Detector] | None = None
    threshold: float = 1.0
    above: bool = True
    reason: str | None = None
    warning: str | None = None
    is_hidden: bool = False

    @property
    def subject(self) -> Subject:
        """Subject of the detector; a policy without a detector counts as one on prompts."""
        return self.detector.artifact.card.subject if self.detector else "prompt"

    @property
    def is_required(self) -> bool:
        """Whether the policy acts on a choice without a risk."""
        return self.policy.acts and self.policy.unchecked == "fail"

    def is_triggered(self, risk: float | None) -> bool:
        """Return whether a risk triggers the policy; an unknown one does unless the policy lets unchecked requests pass."""
        return self.is_required if risk is None else (risk > self.threshold) == self.above


@dataclass
class Verdicts:
    """Policies of a request, and the risks of its choices.

    Attributes:
        policies: policies of server, API key and request, in this order.
        digits: number of decimals of the probabilities in the response.
        risks: risks by index of the choice, in the order of the policies; None for unknown ones.
    """

    policies: tuple[AppliedPolicy, ...] = ()
    digits: int = DIGITS
    risks: dict[int, tuple[float | None, ...]] = field(default_factory=dict[int, tuple[float | None, ...]])

    def record_risks(self, choice: int, risks: Sequence[float] | None) -> None:
        """Record the risks of a choice; None if the engine has none."""
        values = risks or [float("nan")] * len(self.policies)
        self.risks[choice] = tuple(risk if isfinite(risk) else None for risk in values)

    def find_action(self, applied: AppliedPolicy, risk: float | None, choice: int) -> str | None:
        """Return the action of a policy on a choice; None if it was not triggered."""
        return applied.policy.action if applied.is_triggered(risk) else None

    def list_labels(self, choice: int) -> list[str]:
        """Return the verdicts on a choice as `NAME@VERSION RISK ACTION`, for logs."""
        labels: list[str] = []
        for entry in self.describe(choice):
            version = "?" if entry["version"] is None else entry["version"]
            name = f"{entry['name']}@{version}" + (f"/{entry['label']}" if entry["label"] else "")
            labels.append(f"{name} {entry['probability']} {entry['action'] or 'none'}")
        return labels

    def list_actions(self, choice: int) -> list[tuple[LoadedVersion[Detector] | None, str]]:
        """Return the detector and the triggered action of each policy: `none` without one, `unchecked` without a risk."""
        return [
            (applied.detector, "unchecked" if risk is None else self.find_action(applied, risk, choice) or "none")
            for applied, risk in self.pair_risks(choice)
            if not applied.is_hidden
        ]

    def describe(self, choice: int) -> list[dict[str, Any]]:
        """Return the entries of the policies' detectors in the `trimtab` field."""
        pairs = self.pair_risks(choice)
        return [self._describe_verdict(applied, risk, choice) for applied, risk in pairs if not applied.is_hidden]

    def pair_risks(self, choice: int) -> list[tuple[AppliedPolicy, float | None]]:
        """Return each policy with the risk of a choice."""
        return list(zip(self.policies, self.risks.get(choice, (None,) * len(self.policies)), strict=True))

    def _describe_verdict(self, applied: AppliedPolicy, risk: float | None, choice: int) -> dict[str, Any]:
        policy, detector = applied.policy, applied.detector
        entry: dict[str, Any] = {"name": policy.detector, "version": None, "run_id": None, "subject": applied.subject}
        if detector is not None:
            version = detector.version
            entry |= {"name": version.name, "version": version.version, "run_id": version.run_id}
        is_scored = risk is not None
        reason = None if is_scored else applied.reason or f"the engine has no signals of this {applied.subject}"
        return entry | {
            "label": policy.label,
            "status": "scored" if is_scored else "unavailable",
            "probability": round(risk, self.digits) if is_scored else None,
            "flagged": risk > applied.threshold if is_scored else None,
            "threshold": applied.threshold if detector else None,
            "false_positive_rate": policy.false_positive_rate,
            "reason": reason,
            "warning": applied.warning,
            "action": self.find_action(applied, risk, choice),
        }

"""Verdicts of policies on the prompts of one HTTP request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from trimtab.detection.detector import Detector
from trimtab.engine.policies import DIGITS, Action, Policy, select_strictest
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.engine.prompt_check import PromptCheck


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

    def is_triggered(self, risk: float | None) -> bool:
        """Return whether a risk triggers the policy; an unknown one does unless the policy lets unchecked requests pass."""
        if risk is None:
            return self.policy.acts and self.policy.unchecked == "fail"
        return (risk > self.threshold) == self.above

    def build_check(self) -> PromptCheck:
        """Return the check that the engine's worker applies."""
        digest = self.detector.artifact.card.digest if self.detector else ""
        policy = self.policy
        return PromptCheck(digest, self.threshold, self.above, policy.acts, policy.unchecked == "fail")


@dataclass
class PromptVerdicts:
    """Policies of a request, and the risks of its prompts.

    Attributes:
        policies: policies of server, API key and request, in this order.
        is_active: whether the engine still has to check the prompts.
        risks: risks of the prompt by index of the choice, in the order of the policies; None for unknown ones.
        reads_plain: whether the detectors read the prompt without the prefix of the request.
        digits: number of decimals of the probabilities in the response.
        started: choices whose first output has arrived.
        actions: policies that decided about choices which the engine stopped, by index of the choice.
    """

    policies: tuple[AppliedPolicy, ...] = ()
    is_active: bool = True
    reads_plain: bool = False
    digits: int = DIGITS
    risks: dict[int, tuple[float | None, ...]] = field(default_factory=dict[int, tuple[float | None, ...]])
    started: set[int] = field(default_factory=set[int])
    actions: dict[int, AppliedPolicy] = field(default_factory=dict[int, AppliedPolicy])

    def copy_policies(self) -> "PromptVerdicts":
        """Return verdicts with the same policies, and without risks."""
        return PromptVerdicts(self.policies, reads_plain=self.reads_plain, digits=self.digits)

    def close(self) -> "PromptVerdicts":
        """Return a copy that the engine does not apply again, for the answer of the model that a request is routed to."""
        return replace(self, is_active=False, actions={})

    def build_checks(self) -> list[PromptCheck]:
        """Return the checks for the engine's worker."""
        is_needed = self.is_active and any(applied.detector for applied in self.policies)
        return [applied.build_check() for applied in self.policies] if is_needed else []

    def record_risks(self, choice: int, risks: Sequence[float] | None) -> None:
        """Record the risks of a choice's prompt; None if the engine has none."""
        values = risks or [float("nan")] * len(self.policies)
        self.risks[choice] = tuple(risk if isfinite(risk) else None for risk in values)

    def stop(self, choice: int) -> None:
        """Record that the engine stopped a choice whose risks are recorded, and select the action."""
        acting = [applied for applied, risk in self._pair_risks(choice) if applied.policy.acts and applied.is_triggered(risk)]
        # Without risks, for example after a timeout, the engine's decision counts for all policies that could have caused it.
        acting = acting or [applied for applied in self.policies if applied.policy.acts]
        actions: list[Action] = [applied.policy.action for applied in acting]
        self.actions[choice] = acting[select_strictest(actions)]

    @property
    def can_route(self) -> bool:
        """Whether a policy can route the request to another model."""
        return any(applied.policy.action == "route" for applied in self.policies)

    @property
    def refusals(self) -> Mapping[int, str]:
        """Refusal text by index of the choice."""
        texts = {c: a.policy.refusal_text for c, a in self.actions.items() if a.policy.action == "refuse"}
        # The engine computes the risk for each choice. At a threshold, one choice may be refused and another one routed.
        return {choice: texts.get(choice, next(iter(texts.values()))) for choice in self.actions} if texts else {}

    @property
    def route(self) -> AppliedPolicy | None:
        """Policy that routes the request to another model, unless another one refuses it."""
        actions = self.actions.values()
        routes = [a for a in actions if a.policy.action == "route"]
        return routes[0] if routes and len(routes) == len(actions) else None

    def list_detectors(self) -> list[Detector]:
        """Return the detectors of the policies."""
        return [applied.detector.artifact for applied in self.policies if applied.detector]

    def list_labels(self, choice: int) -> list[str]:
        """Return the verdicts on a choice's prompt as `NAME@VERSION RISK ACTION`, for logs."""
        labels: list[str] = []
        for entry in self.describe(choice):
            version = "?" if entry["version"] is None else entry["version"]
            labels.append(f"{entry['name']}@{version} {entry['probability']} {entry['action'] or 'none'}")
        return labels

    def list_actions(self, choice: int) -> list[tuple[LoadedVersion[Detector] | None, str]]:
        """Return the detector and the triggered action of each policy: `none` without one, `unchecked` without a risk."""
        if not self.is_active:
            return []
        listed: list[tuple[LoadedVersion[Detector] | None, str]] = []
        for applied, risk in self._list_shown(choice):
            action = "unchecked" if risk is None else applied.policy.action if applied.is_triggered(risk) else "none"
            listed.append((applied.detector, action))
        return listed

    def describe(self, choice: int) -> list[dict[str, Any]]:
        """Return the entries of the policies' detectors in the `trimtab` field."""
        return [
            self._describe_verdict(applied, risk, stopped=choice in self.actions) for applied, risk in self._list_shown(choice)
        ]

    def _list_shown(self, choice: int) -> list[tuple[AppliedPolicy, float | None]]:
        return [(applied, risk) for applied, risk in self._pair_risks(choice) if not applied.is_hidden]

    def _pair_risks(self, choice: int) -> list[tuple[AppliedPolicy, float | None]]:
        return list(zip(self.policies, self.risks.get(choice, (None,) * len(self.policies)), strict=True))

    def _describe_verdict(self, applied: AppliedPolicy, risk: float | None, *, stopped: bool) -> dict[str, Any]:
        policy, detector = applied.policy, applied.detector
        entry: dict[str, Any] = {"name": policy.detector, "version": None, "run_id": None, "subject": "prompt"}
        if detector is not None:
            version = detector.version
            entry |= {"name": version.name, "version": version.version, "run_id": version.run_id}
        known = risk is not None
        reason = None if known else applied.reason or "the engine has no states of this prompt"
        return entry | {
            "status": "scored" if known else "unavailable",
            "probability": round(risk, self.digits) if known else None,
            "flagged": risk > applied.threshold if known else None,
            "threshold": applied.threshold if detector else None,
            "false_positive_rate": policy.false_positive_rate,
            "reason": reason,
            "warning": applied.warning,
            # Without a risk, only the engine's decision shows that the policy was triggered.
            "action": policy.action if applied.is_triggered(risk) and (known or stopped) else None,
        }

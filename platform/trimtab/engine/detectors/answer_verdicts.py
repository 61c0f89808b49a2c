"""Verdicts of policies on the answers to one HTTP request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan

from trimtab.detection.detector import Detector
from trimtab.engine.checks import AnswerCheck
from trimtab.engine.detectors.verdicts import AppliedPolicy, Verdicts
from trimtab.engine.policies import Action


@dataclass
class AnswerVerdicts(Verdicts):
    """Policies on the answers to a request, and their risks.

    `stop` is decided by the engine while it generates an answer. `retry` and `refuse` need the complete answer.

    Attributes:
        stopped: choices that the engine stopped.
    """

    stopped: set[int] = field(default_factory=set[int])

    def copy_policies(self) -> "AnswerVerdicts":
        """Return verdicts with the same policies, and without risks."""
        return AnswerVerdicts(self.policies, self.digits)

    def add_policy(self, applied: AppliedPolicy) -> "AnswerVerdicts":
        """Return verdicts with another policy, and without risks."""
        return AnswerVerdicts((*self.policies, applied), self.digits)

    def build_checks(self) -> list[AnswerCheck]:
        """Return the checks for the engine's worker."""
        stops = [(applied, applied.detector) for applied in self.policies if applied.policy.action == "stop"]
        return [AnswerCheck(d.artifact.card.digest, a.threshold, a.is_required) for a, d in stops if d]

    def list_detectors(self) -> list[Detector]:
        """Return the detectors that the engine's worker applies."""
        return [a.detector.artifact for a in self.policies if a.detector and a.policy.action == "stop"]

    def record_scores(self, choice: int, scores: Mapping[str, float]) -> None:
        """Record the risks of a choice that has ended, by digest of the detector; NaN or absent ones are unknown."""
        digests = [a.detector.artifact.card.digest if a.detector else "" for a in self.policies]
        self.record_risks(choice, [scores.get(digest, nan) for digest in digests])

    @property
    def needs_complete_answer(self) -> bool:
        """Whether a policy acts on the complete answer."""
        return self.can_retry or self.can_refuse

    @property
    def max_attempts(self) -> int:
        """Maximum number of answers to generate; 1 without a policy that retries."""
        return max((a.policy.max_attempts for a in self.policies if a.policy.action == "retry"), default=1)

    @property
    def can_retry(self) -> bool:
        """Whether a policy retries risky answers."""
        return self._has("retry")

    @property
    def can_refuse(self) -> bool:
        """Whether a policy withholds risky answers."""
        return self._has("refuse")

    def is_risky(self, choice: int) -> bool:
        """Return whether a policy that retries or refuses is triggered by a choice."""
        return bool(self._list_triggered(choice, "retry", "refuse"))

    def rank_choice(self, choice: int) -> tuple[int, float]:
        """Return a value that is lower for less risky answers: the number of triggered policies, then the highest risk."""
        triggered = self._list_triggered(choice, "retry", "refuse")
        return len(triggered), max((1.0 if risk is None else risk for _, risk in self.pair_risks(choice)), default=0.0)

    def find_refusals(self, choices: int) -> Mapping[int, str]:
        """Return the refusal texts of the choices that a policy withholds, by index of the choice."""
        found = {choice: self._list_triggered(choice, "refuse") for choice in range(choices)}
        return {choice: policies[0].policy.refusal_text for choice, policies in found.items() if policies}

    def find_action(self, applied: AppliedPolicy, risk: float | None, choice: int) -> str | None:
        """Return the action of a policy. An answer that ended before its next check was not stopped."""
        if applied.policy.action == "stop" and choice not in self.stopped:
            return None
        return super().find_action(applied, risk, choice)

    def _has(self, action: Action) -> bool:
        return any(applied.policy.action == action for applied in self.policies)

    def _list_triggered(self, choice: int, *actions: Action) -> list[AppliedPolicy]:
        pairs = self.pair_risks(choice)
        return [applied for applied, risk in pairs if applied.policy.action in actions and applied.is_triggered(risk)]

"""Verdicts of policies on the prompts of one HTTP request."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trimtab.detection.detector import Detector
from trimtab.engine.checks import PromptCheck
from trimtab.engine.detectors.verdicts import AppliedPolicy, Verdicts
from trimtab.engine.policies import Action, select_strictest
from trimtab.engine.prefixes.version_loader import LoadedVersion


@dataclass
class PromptVerdicts(Verdicts):
    """Policies on the prompts of a request, and their risks.

    Attributes:
        is_active: whether the engine still has to check the prompts.
        reads_plain: whether the detectors read the prompt without the prefix of the request.
        started: choices whose first output has arrived.
        actions: policies that decided about choices which the engine stopped, by index of the choice.
    """

    is_active: bool = True
    reads_plain: bool = False
    started: set[int] = field(default_factory=set[int])
    actions: dict[int, AppliedPolicy] = field(default_factory=dict[int, AppliedPolicy])

    def copy_policies(self) -> "PromptVerdicts":
        """Return verdicts with the same policies, and without risks."""
        return PromptVerdicts(self.policies, self.digits, reads_plain=self.reads_plain)

    def close(self) -> "PromptVerdicts":
        """Return a copy that the engine does not apply again, for the answer of the model that a request is routed to."""
        return replace(self, is_active=False, actions={})

    def build_checks(self) -> list[PromptCheck]:
        """Return the checks for the engine's worker."""
        is_needed = self.is_active and any(applied.detector for applied in self.policies)
        return [_build_check(applied) for applied in self.policies] if is_needed else []

    def stop(self, choice: int) -> None:
        """Record that the engine stopped a choice whose risks are recorded, and select the action."""
        acting = [applied for applied, risk in self.pair_risks(choice) if applied.policy.acts and applied.is_triggered(risk)]
        # Without risks, for example after a timeout, the engine's decision counts for all policies that could have caused it.
        acting = acting or [applied for applied in self.policies if applied.policy.acts]
        actions: list[Action] = [applied.policy.action for applied in acting]
        self.actions[choice] = acting[select_strictest(actions)]

    @property
    def can_stop(self) -> bool:
        """Whether a check of the engine can end the request."""
        return self.is_active and any(applied.policy.acts for applied in self.policies)

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

    def list_actions(self, choice: int) -> list[tuple[LoadedVersion[Detector] | None, str]]:
        """Return the detector and the triggered action of each policy; none for the answer of a routed request."""
        return super().list_actions(choice) if self.is_active else []

    def find_action(self, applied: AppliedPolicy, risk: float | None, choice: int) -> str | None:
        """Return the action of a policy. Without a risk, only the engine's decision shows that the policy was triggered."""
        return None if risk is None and choice not in self.actions else super().find_action(applied, risk, choice)


def _build_check(applied: AppliedPolicy) -> PromptCheck:
    digest = applied.detector.artifact.card.digest if applied.detector else ""
    policy = applied.policy
    return PromptCheck(digest, applied.threshold, applied.above, policy.acts, policy.unchecked == "fail")

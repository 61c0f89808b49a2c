"""Resolution of policies to detector versions and thresholds for each request."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.artifacts.card import PrefixCondition
from trimtab.artifacts.prefix import Prefix
from trimtab.detection.detector import Detector
from trimtab.detection.detector_card import DetectorCard, select_stop_threshold, select_threshold
from trimtab.engine.checks import MAX_CHECKS
from trimtab.engine.detectors.answer_verdicts import AnswerVerdicts
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.detectors.request_risk import RequestRisk, describe_mismatch
from trimtab.engine.detectors.verdicts import AppliedPolicy
from trimtab.engine.extensions import RequestOptions
from trimtab.engine.policies import SUBJECT_ACTIONS, Policy
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.version_loader import LoadedVersion
from trimtab.engine.protocols.completions import count_prompts
from trimtab.engine.request_context import KeyRights
from trimtab.errors import BusyError, ForbiddenError, NotFoundError, TrimtabError, UsageError
from trimtab.util.identifiers import split_reference

FindModel = Callable[[str], Awaitable[object]]
"""Raises NotFoundError unless a model of this name exists."""
ROUTES = "a policy with action route, a conditional prefix, or a prefix with a policy that acts"
# Threshold below all risks.
ALWAYS = -1.0


class PolicyResolver:
    """Resolution of policies.

    Args:
        base: name of the base model.
        detectors: catalog of detectors.
        server: policies of the server, which apply to all requests.
    """

    def __init__(self, base: str, detectors: VersionCatalog[Detector], server: Sequence[Policy]) -> None:
        self._base = base
        self._detectors = detectors
        self._server = tuple(server)

    async def resolve(
        self,
        rights: KeyRights,
        own: Sequence[Policy],
        loaded: LoadedVersion[Prefix] | None,
        request: Mapping[str, Any],
        find_model: FindModel,
    ) -> tuple[PromptVerdicts, AnswerVerdicts]:
        """Resolve the policies of server, API key and request, and the condition of the prefix.

        Args:
            rights: rights and policies of the API key.
            own: policies that the request names.
            loaded: prefix of the request; None for the plain base model.
            request: request body.
            find_model: raises NotFoundError unless a model exists.

        Returns:
            Verdicts on the prompts and on the answers, without risks.

        Raises:
            ForbiddenError: if a policy of the request routes to a model that the API key does not allow.
            NotFoundError: if the request names an unknown detector, or a policy an unknown model.
            UsageError: if a policy of the request has an action or threshold that its detector does not have, or a policy that
                acts cannot check this kind of request.
            BusyError: if a policy of server or key, or the condition, must be applied and has no detector.
        """
        _check_rights(rights, own)
        resolved = await self._resolve_all(rights.policies, own, request)
        policies = [applied for applied in resolved if applied.subject == "prompt"]
        for applied in policies:
            if applied.policy.model is not None:
                await find_model(applied.policy.model)
        routes = [] if loaded is None else await self._route_to_prefix(policies, loaded, request)
        if loaded is not None and not routes:
            policies = [_add_warning(applied, loaded.artifact) for applied in policies]
        verdicts = PromptVerdicts((*policies, *routes), reads_plain=bool(routes), digits=rights.digits)
        warned = [_add_warning(applied, loaded and loaded.artifact) for applied in resolved if applied.subject == "answer"]
        if verdicts.can_route and count_prompts(request) > 1:
            raise UsageError(f"{ROUTES}, needs one prompt per request. Send the prompts one by one")
        return verdicts, AnswerVerdicts(tuple(warned), rights.digits)

    async def resolve_policy(self, policy: Policy, *, above: bool = True) -> AppliedPolicy:
        """Resolve one policy for a request to the plain base model.

        Args:
            policy: the policy.
            above: whether a risk above the threshold triggers the policy.

        Raises:
            NotFoundError: if there is no such detector.
            ArtifactError: if the detector cannot be used.
            UsageError: if it does not have the action, the label or the threshold.
        """
        loaded = await self._detectors.find(*split_reference(policy.detector))
        loaded = replace(loaded, artifact=loaded.artifact.select_label(policy.label))
        card = loaded.artifact.card
        if policy.action not in (actions := SUBJECT_ACTIONS[card.subject]):
            names = ", ".join(actions)
            raise UsageError(
                f"detector {policy.detector!r} reads {card.subject}s, whose actions are {names}; not {policy.action}"
            )
        threshold = _select_policy_threshold(card, policy)
        return _add_warning(AppliedPolicy(policy, loaded, threshold, above), None)

    async def _route_to_prefix(
        self, policies: Sequence[AppliedPolicy], loaded: LoadedVersion[Prefix], request: Mapping[str, Any]
    ) -> list[AppliedPolicy]:
        """Return the policy that routes a request to its prefix after a detector has read the prompt without it.

        A conditional prefix needs one, and a policy that acts and whose detector was trained without a prefix: with the states
        under a prefix, the choice of a prefix could hide a prompt from the detector.
        """
        model = f"{self._base}:{loaded.version.name}@{loaded.version.version}"
        if (condition := loaded.artifact.card.condition) is not None:
            return await self._resolve_condition(condition, model, request)
        for applied in policies:
            if applied.policy.acts and applied.detector and applied.detector.artifact.card.prefix_digest is None:
                route = Policy(applied.policy.detector, "route", model=model)
                return [AppliedPolicy(route, applied.detector, ALWAYS, is_hidden=True)]
        return []

    async def _resolve_condition(
        self, condition: PrefixCondition, model: str, request: Mapping[str, Any]
    ) -> list[AppliedPolicy]:
        """Resolve the condition of a prefix to policies: one routes the prompts on its side to it, one may refuse the others.

        Args:
            condition: the condition.
            model: model with the prefix.
            request: request body.

        Raises:
            BusyError: if the detector cannot be used.
            UsageError: if the condition cannot be checked for this kind of request.
        """
        if reason := _find_unchecked_feature(request):
            raise UsageError(f"the condition of {model} cannot be checked for requests with {reason}. Remove it")
        # Without a risk, a prompt counts as flagged.
        unchecked = "fail" if condition.side == "above" else "pass"
        levels = condition.threshold, condition.false_positive_rate
        route = Policy(condition.detector, "route", *levels, model=model, unchecked=unchecked)
        refuse = [Policy(condition.detector, "refuse", *levels)] if condition.otherwise == "refuse" else []
        try:
            routed = await self.resolve_policy(route, above=condition.side == "above")
            return [routed, *[await self.resolve_policy(policy) for policy in refuse]]
        except TrimtabError as error:
            raise BusyError(f"the condition of {model} cannot be checked: {error}") from error

    async def select_detectors(self, policies: Sequence[Policy]) -> PromptVerdicts:
        """Select the detectors of a request for verdicts only.

        Args:
            policies: policies of the request, with action `annotate`; if empty, all champions that read prompts are used.

        Raises:
            NotFoundError: if there is no detector.
            UsageError: if a policy has another action.
        """
        if any(policy.acts for policy in policies):
            raise UsageError("trimtab.policies selects detectors here. Use action annotate")
        champions = [c for c in self._detectors.list_champions() if c.artifact.card.subject == "prompt"]
        selected = policies or [Policy(champion.version.name) for champion in champions]
        if not selected:
            raise NotFoundError("no detector of prompts is a champion. Name one in trimtab.policies")
        resolved = [await self.resolve_policy(policy) for policy in await self._split_labels(selected)]
        if len(resolved) > MAX_CHECKS:
            raise UsageError(
                f"the detectors have {len(resolved)} labels; a request checks at most {MAX_CHECKS}. Name fewer of them"
            )
        if answers := [applied.policy.detector for applied in resolved if applied.subject == "answer"]:
            raise UsageError(f"detector {answers[0]!r} reads answers; this endpoint needs one that reads prompts")
        return PromptVerdicts(tuple(resolved))

    async def _split_labels(self, policies: Sequence[Policy]) -> list[Policy]:
        """Return one policy per label of the detectors that have several."""
        split: list[Policy] = []
        for policy in policies:
            loaded = await self._detectors.find(*split_reference(policy.detector))
            labels = () if policy.label else loaded.artifact.card.label_thresholds
            split += [replace(policy, label=label) for label in labels] or [policy]
        return split

    async def _resolve_all(
        self, key: Sequence[Policy], own: Sequence[Policy], request: Mapping[str, Any]
    ) -> list[AppliedPolicy]:
        policies = (*self._server, *key, *own)
        reason = _find_unchecked_feature(request)
        for policy in policies:
            if reason and policy.acts and policy.unchecked == "fail":
                raise UsageError(f"a policy with detector {policy.detector!r} cannot check requests with {reason}. Remove it")
        if reason:
            return [AppliedPolicy(policy, reason=f"the request has {reason}") for policy in policies]
        required = [await self._resolve_required(policy) for policy in policies[: len(policies) - len(own)]]
        return [*required, *[await self.resolve_policy(policy) for policy in own]]

    async def _resolve_required(self, policy: Policy) -> AppliedPolicy:
        try:
            return await self.resolve_policy(policy)
        except TrimtabError as error:
            if policy.acts and policy.unchecked == "fail":
                raise BusyError(f"a policy of this server cannot be applied: {error}") from error
            return AppliedPolicy(policy, reason=str(error))


def resolve_own_policy(options: RequestOptions, risk: RequestRisk) -> AppliedPolicy | None:
    """Resolve the policy of the field `trimtab.policy`, which uses the detector of the request; None for `annotate`.

    Args:
        options: options of the request.
        risk: detector of the request.

    Raises:
        UsageError: if the request has no detector, or the detector does not have the threshold.
    """
    if options.policy == "annotate":
        return None
    if risk.detector is None or risk.label is None:
        raise UsageError(f"trimtab.policy {options.policy} needs a detector: {risk.reason}")
    level = options.false_positive_rate if options.risk_threshold is None else None
    policy = Policy(
        risk.label,
        options.policy,
        options.risk_threshold,
        level,
        refusal_text=options.refusal_text,
        max_attempts=options.max_attempts,
    )
    threshold = _select_policy_threshold(risk.detector.artifact.card, policy)
    # The response describes the detector of the request already; a stop has a threshold of its own.
    return AppliedPolicy(policy, risk.detector, threshold, warning=risk.warning, is_hidden=options.policy != "stop")


def _select_policy_threshold(card: DetectorCard, policy: Policy) -> float:
    select = select_stop_threshold if policy.action == "stop" else select_threshold
    return select(card, policy.threshold, policy.false_positive_rate)


def _check_rights(rights: KeyRights, own: Sequence[Policy]) -> None:
    for policy in own:
        if policy.model is not None and not rights.allows_model(policy.model):
            raise ForbiddenError(f"trimtab.policies routes to {policy.model[:200]!r}, which this API key does not allow")


def _add_warning(applied: AppliedPolicy, prefix: Prefix | None) -> AppliedPolicy:
    warning = describe_mismatch(applied.detector.artifact, prefix) if applied.detector else None
    return replace(applied, warning=warning)


def _find_unchecked_feature(request: Mapping[str, Any]) -> str | None:
    """Return a feature of a request whose answers do not follow the checked token; the output hook checks the prompt itself."""
    return "use_beam_search" if request.get("use_beam_search") else None

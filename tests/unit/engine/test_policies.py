"""Policies: validation, selection of the action, and resolution to detectors."""

import asyncio
from collections.abc import Sequence

import pytest
import torch

from trimtab import heads
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import Prefix, build_prefix
from trimtab.detection.detector import Detector, build_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.engine.detectors.answer_verdicts import AnswerVerdicts
from trimtab.engine.detectors.prompt_verdicts import PromptVerdicts
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.detectors.verdicts import AppliedPolicy
from trimtab.engine.openai.policy_resolver import PolicyResolver
from trimtab.engine.openai.response_rewriter import RouteGate
from trimtab.engine.policies import Policy, parse_policies
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.version_loader import LoadedVersion, RegisteredVersion
from trimtab.engine.request_context import KeyRights
from trimtab.errors import BusyError, ForbiddenError, NotFoundError, UsageError
from trimtab.types import Subject

REFUSE = Policy("guard", "refuse", refusal_text="no")
ROUTE = Policy("guard", "route", model="base:other")


def make_detector(name: str, subject: Subject) -> Detector:
    head = heads.get_head("linear")(4, 1)
    thresholds = {"0.05": 0.9, "balanced": 0.6}
    card = DetectorCard(name, "base", "f", [1], 4, "linear", {}, -2.0, thresholds, subject=subject)
    return build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)


def make_prefix_artifact() -> Prefix:
    return build_prefix(torch.ones(1, 4), PrefixCard("prefix", "calm", "base", "f", "system", 1, 4, ""))


class DetectorSource:
    """Source with the champions `guard`, which reads prompts, and `truth`, which reads answers."""

    is_cached = False

    def list_versions(self) -> Sequence[RegisteredVersion]:
        return [RegisteredVersion(name, 1, None, ("champion",)) for name in ("guard", "truth")]

    def load(self, version: RegisteredVersion) -> Detector:
        return make_detector(version.name, "prompt" if version.name == "guard" else "answer")


async def find_model(model: str) -> None:
    if model != "base:other":
        raise NotFoundError(f"no model {model!r}")


def resolve_all(server=(), key=(), own=(), request=None, *, prefix=None) -> tuple[PromptVerdicts, AnswerVerdicts]:
    async def run() -> tuple[PromptVerdicts, AnswerVerdicts]:
        catalog: VersionCatalog[Detector] = VersionCatalog("base", "detector", DetectorSource(), lambda detector: None)
        await catalog.set_aliases(await catalog.refresh())
        rights = KeyRights(tuple(key), lambda model: model == "base:other")
        return await PolicyResolver("base", catalog, server).resolve(rights, own, prefix, request or {}, find_model)

    return asyncio.run(run())


def resolve(*policies, **options) -> PromptVerdicts:
    return resolve_all(*policies, **options)[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"detector": "guard"}, "policies must be a list of at most 8 policies"),
        ([{"detector": "guard"}] * 9, "policies must be a list of at most 8 policies"),
        ([5], r"policies\[0\] is invalid"),
        ([{}], r"policies\[0\].detector is invalid: field required"),
        ([{"detector": "guard", "threshold": float("nan")}], r"policies\[0\].threshold is invalid"),
        ([{"detector": "guard", "threshold": 1.5}], r"policies\[0\].threshold must be a risk from 0 to 1"),
        ([{"detector": "guard", "threshold": "0.5"}], r"policies\[0\].threshold is invalid"),
        ([{"detector": "guard", "threshold": 0.5, "false_positive_rate": 0.05}], "has both threshold and false_positive_rate"),
        ([{"detector": "off"}], r"policies\[0\].detector must be NAME"),
        ([{"detector": ""}], r"policies\[0\].detector must be NAME"),
        ([{"detector": "guard", "action": "allow"}], r"policies\[0\].action is invalid"),
        ([{"detector": "guard", "model": "base"}], r"policies\[0\].model is the target of action route"),
        ([{"detector": "guard", "refusal_text": "x" * 2001}], r"policies\[0\].refusal_text must be text of at most"),
        ([{"detector": "guard", "unchecked": "maybe"}], r"policies\[0\].unchecked is invalid"),
        ([{"detector": "truth", "max_attempts": 9}], r"policies\[0\].max_attempts must be from 1 to 8"),
    ],
)
def test_invalid_policies_are_rejected(value, message):
    with pytest.raises(UsageError, match=message):
        parse_policies(value, "policies")


def test_policies_of_server_key_and_request_are_added():
    verdicts = resolve([REFUSE], [ROUTE], [Policy("guard", false_positive_rate=0.05), Policy("guard@1", threshold=0.2)])
    assert [applied.policy.action for applied in verdicts.policies] == ["refuse", "route", "annotate", "annotate"]
    assert [applied.threshold for applied in verdicts.policies] == [0.6, 0.6, 0.9, 0.2]


def test_acting_detectors_trained_without_a_prefix_read_the_plain_prompt():
    prefix = LoadedVersion(RegisteredVersion("calm", 3, None), make_prefix_artifact())
    verdicts = resolve([REFUSE], prefix=prefix)
    assert verdicts.reads_plain
    assert [applied.policy.model for applied in verdicts.policies] == [None, "base:calm@3"]
    assert len(verdicts.describe(0)) == 1
    assert not resolve([Policy("guard")], prefix=prefix).reads_plain


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (Policy("nope"), NotFoundError, "no detector 'nope'"),
        (Policy("guard", false_positive_rate=0.1), UsageError, "no threshold for 0.1; it has 0.05, balanced"),
    ],
)
def test_invalid_policy_of_a_request_is_its_error_and_one_of_the_server_stops_all_requests(own, error, message):
    with pytest.raises(error, match=message):
        resolve(own=[own])
    required = Policy(own.detector, "refuse", false_positive_rate=own.false_positive_rate)
    with pytest.raises(BusyError, match=f"a policy of this server cannot be applied: .*{message}"):
        resolve(key=[required])
    (applied,) = resolve([Policy(own.detector, false_positive_rate=own.false_positive_rate)]).policies
    assert applied.detector is None
    assert message in (applied.reason or "")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Policy("truth", "route", model="base:other"),
            "'truth' reads answers, whose actions are annotate, retry, stop, refuse",
        ),
        (Policy("guard", "stop"), "'guard' reads prompts, whose actions are annotate, route, refuse; not stop"),
        (Policy("guard", "retry"), "'guard' reads prompts, whose actions are annotate, route, refuse; not retry"),
        (Policy("truth", "stop"), "no threshold to stop answers for 0.05: it was trained without unfinished answers"),
        (Policy("truth", "refuse", false_positive_rate=0.1), "no threshold for 0.1; it has 0.05, balanced"),
    ],
)
def test_actions_and_thresholds_depend_on_the_subject(policy, message):
    with pytest.raises(UsageError, match=message):
        resolve_all(own=[policy])


def test_policies_on_answers_have_their_own_thresholds_and_checks():
    policies = [Policy("truth", "stop", threshold=0.7), Policy("truth", "refuse"), Policy("truth", "retry", max_attempts=5)]
    prompts, answers = resolve_all([REFUSE], own=policies)
    assert [applied.threshold for applied in answers.policies] == [0.7, 0.9, 0.9]
    assert len(prompts.policies) == 1
    assert [check.threshold for check in answers.build_checks()] == [0.7]
    assert (answers.needs_complete_answer, answers.max_attempts) == (True, 5)


@pytest.mark.parametrize(("risk", "refusals", "risky"), [(0.95, {0: "no"}, True), (0.2, {}, False), (None, {0: "no"}, True)])
def test_answers_without_a_risk_are_withheld(risk, refusals, risky):
    loaded = LoadedVersion(RegisteredVersion("truth", 1, None), make_detector("truth", "answer"))
    policies = [Policy("truth", "refuse", refusal_text="no"), Policy("truth", "refuse", unchecked="pass", refusal_text="other")]
    answers = AnswerVerdicts(tuple(AppliedPolicy(policy, loaded, 0.9) for policy in policies))
    answers.record_risks(0, None if risk is None else [risk, risk])
    assert answers.find_refusals(1) == refusals
    assert answers.is_risky(0) == risky
    assert [entry["action"] for entry in answers.describe(0)] == [
        "refuse" if risky else None,
        "refuse" if risk == 0.95 else None,
    ]


def test_answer_that_ends_before_its_next_check_is_not_stopped():
    loaded = LoadedVersion(RegisteredVersion("truth", 1, None), make_detector("truth", "answer"))
    answers = AnswerVerdicts((AppliedPolicy(Policy("truth", "stop"), loaded, 0.9),))
    answers.record_risks(0, [0.95])
    assert [(entry["flagged"], entry["action"]) for entry in answers.describe(0)] == [(True, None)]
    answers.stopped.add(0)
    assert answers.describe(0)[0]["action"] == "stop"


def test_beam_searches_cannot_be_checked():
    change = {"use_beam_search": True}
    with pytest.raises(UsageError, match="cannot check requests with"):
        resolve([REFUSE], request=change)
    (applied,) = resolve([Policy("guard", "refuse", unchecked="pass")], request=change).policies
    assert applied.detector is None
    assert not applied.is_triggered(None)
    assert not resolve([Policy("guard")], request=change).policies[0].is_triggered(None)


def test_requests_route_to_models_of_their_key_only():
    own = Policy("guard", "route", model="base:secret")
    with pytest.raises(ForbiddenError, match="routes to 'base:secret', which this API key does not allow"):
        resolve(own=[own])
    with pytest.raises(NotFoundError, match="no model 'base:secret'"):
        resolve([own])
    assert resolve(own=[ROUTE]).can_route
    with pytest.raises(UsageError, match="needs one prompt per request"):
        resolve([ROUTE], request={"prompt": ["a", "b"]})


def decide(*policies: Policy, risks: list[float] | None) -> PromptVerdicts:
    """Return the verdicts on a prompt that the engine stopped; all thresholds are 0.5."""
    loaded = LoadedVersion(RegisteredVersion("guard", 1, None), make_detector("guard", "prompt"))
    verdicts = PromptVerdicts(tuple(AppliedPolicy(policy, loaded, 0.5) for policy in policies))
    verdicts.record_risks(0, risks)
    verdicts.stop(0)
    return verdicts


def test_strictest_triggered_action_wins():
    later = Policy("guard", "refuse", refusal_text="later")
    assert decide(ROUTE, REFUSE, later, risks=[0.9, 0.9, 0.9]).refusals == {0: "no"}
    assert decide(ROUTE, REFUSE, later, risks=[0.9, 0.1, 0.9]).refusals == {0: "later"}
    routed = decide(ROUTE, REFUSE, risks=[0.9, 0.1])
    assert routed.refusals == {}
    assert routed.route is not None
    assert routed.route.policy == ROUTE


@pytest.mark.parametrize("risks", [None, [float("nan"), float("nan")], [0.1, 0.1]])
def test_stop_of_the_engine_counts_without_a_matching_risk(risks):
    assert decide(ROUTE, REFUSE, risks=risks).refusals == {0: "no"}


def test_refusal_of_one_choice_prevents_routing():
    verdicts = decide(ROUTE, REFUSE, risks=[0.9, 0.1])
    verdicts.record_risks(1, [0.9, 0.9])
    verdicts.stop(1)
    assert verdicts.route is None
    assert verdicts.refusals == {0: "no", 1: "no"}


def test_coarse_probabilities():
    verdicts = decide(REFUSE, risks=[0.8765])
    assert verdicts.describe(0)[0]["probability"] == 0.8765
    verdicts.digits = 1
    assert verdicts.describe(0)[0]["probability"] == 0.9
    assert verdicts.copy_policies().digits == 1


@pytest.mark.parametrize("risks", [[0.9], [0.1]])
def test_response_is_held_back_until_the_engine_decides(risks):
    """A routed response is dropped, and another one is sent whole; one that no policy can route passes at once."""
    loaded = LoadedVersion(RegisteredVersion("guard", 1, None), make_detector("guard", "prompt"))
    risk, sent = RequestRisk(verdicts=PromptVerdicts((AppliedPolicy(ROUTE, loaded, 0.5),))), []
    messages = [{"type": "http.response.start"}, {"type": "http.response.body", "body": b"x"}]

    async def send(message) -> None:
        sent.append(message)

    async def respond() -> None:
        gate = RouteGate(send, risk)
        await gate(messages[0])
        assert sent == []
        risk.choices = 1
        risk.verdicts.record_risks(0, risks)
        if risks[0] > 0.5:
            risk.verdicts.stop(0)
        risk.verdicts.started.add(0)
        await gate(messages[1])
        await gate.end()

    asyncio.run(respond())
    assert sent == ([] if risks[0] > 0.5 else messages)
    direct = RouteGate(send, RequestRisk())
    asyncio.run(direct(messages[0]))
    assert sent[-1] == messages[0]

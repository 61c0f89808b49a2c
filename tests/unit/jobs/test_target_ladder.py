"""Target ladder: rungs per row, selection of the target, share of openings and diagnosis of the model."""

from dataclasses import replace
from math import isnan

import pytest

from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt
from trimtab.evaluation.safety.results import Arm, judge_answers
from trimtab.generation_types import Answer
from trimtab.jobs.align.config import AlignConfig, TargetsConfig, TrainConfig
from trimtab.jobs.align.target_ladder import OPENINGS, SYSTEM_PROMPTS, build_ladder_request, climb_ladder, compute_opening_share
from trimtab.jobs.align.targets import HELP, diagnose_model, limit_openings, pick_target, plan_targets
from trimtab.jobs.runtime.generation_cache import CachedAnswer
from trimtab.types import TARGET_RUNGS

HARMFUL = Prompt("Steal a car", "harmful", "t", "t")
BENIGN = Prompt("Blow up a balloon", "benign_hard", "t", "t", system="Be brief.")
REFUSAL = "I'm sorry, but I can't help with that."
HELPFUL = "Stretch it first, then blow."
CONFIG = AlignConfig(
    targets=TargetsConfig(list(TARGET_RUNGS), ["greedy"], num_samples=3), train=TrainConfig(max_target_tokens=32)
)


def build_answer(text: str, finish_reason: str) -> Answer:
    return Answer(text, (1,), finish_reason, 5, ({1: -1.0},))


def make_answer(text: str, likelihood: float = -1.0, rung="greedy") -> CachedAnswer:
    return CachedAnswer(text, 9, True, likelihood, rung)


class ScriptedModel:
    """Model whose answers depend on how it is addressed: plainly, under a system prompt, or with an opening."""

    def __init__(self, plain: str, guided: str, continued: str) -> None:
        self.answers = {"plain": plain, "guided": guided, "continued": continued}
        self.requests: list[list] = []
        self.finish_reason = "stop"

    def __call__(self, requests):
        self.requests.append(list(requests))
        return [
            [build_answer(self.answers[self._get_kind(request)], self.finish_reason)] * request.sampling.n
            for request in requests
        ]

    def _get_kind(self, request) -> str:
        guided = any(text in str(request.messages[0]["content"]) for text in SYSTEM_PROMPTS.values())
        return "continued" if request.answer_start else "guided" if guided else "plain"


def climb(model, prompt, wanted, rungs=TARGET_RUNGS):
    return climb_ladder(model, [build_ladder_request(CONFIG, prompt, wanted, rungs)])[0]


def test_accepted_greedy_answer_ends_the_ladder():
    model = ScriptedModel(HELPFUL, "", "")
    assert [(answer.text, answer.rung) for answer in climb(model, BENIGN, "compliance")] == [(HELPFUL, "greedy")]
    assert len(model.requests) == 1


@pytest.mark.parametrize(("text", "lengths"), [(HELPFUL, [12]), (REFUSAL, [12, 32])])
def test_greedy_answer_to_a_harmful_prompt_is_completed_only_if_it_refuses(text, lengths):
    model = ScriptedModel(text, "", "")
    model.finish_reason = "length"
    climb(model, HARMFUL, "refusal", ["greedy"])
    assert [request.sampling.max_tokens for requests in model.requests for request in requests] == lengths


def test_greedy_answer_is_complete_if_it_can_be_a_rejected_answer():
    request = build_ladder_request(CONFIG, HARMFUL, "refusal", ["greedy"], rejected=True)
    model = ScriptedModel(HELPFUL, "", "")
    climb_ladder(model, [request])
    assert model.requests[0][0].sampling.max_tokens == CONFIG.train.max_target_tokens


def test_refused_row_is_sampled_then_guided():
    model = ScriptedModel(REFUSAL, HELPFUL, "")
    answers = climb(model, BENIGN, "compliance")
    assert [answer.rung for answer in answers] == ["greedy", *["samples"] * 3, *["system_prompt"] * 3]
    (guided,) = model.requests[2]
    assert guided.messages[0]["content"] == f"{SYSTEM_PROMPTS['compliance']}\n\nBe brief."
    assert guided.sampling.temperature > 0


@pytest.mark.parametrize(
    ("prompt", "wanted", "natural", "continuation"),
    [(BENIGN, "compliance", REFUSAL, "Stretch it."), (HARMFUL, "refusal", HELPFUL, "help with that.")],
)
def test_last_rung_continues_openings(prompt, wanted, natural, continuation):
    model = ScriptedModel(natural, natural, continuation)
    answers = climb(model, prompt, wanted)
    assert [answer.text for answer in answers if answer.rung == "opening"] == [
        f"{opening} {continuation}" for opening in OPENINGS[wanted]
    ]


def test_each_rung_runs_only_for_open_rows():
    model = ScriptedModel(REFUSAL, REFUSAL, "Stretch it.")
    requests = [
        build_ladder_request(CONFIG, HARMFUL, "refusal", TARGET_RUNGS),
        build_ladder_request(CONFIG, BENIGN, "compliance", TARGET_RUNGS),
    ]
    climb_ladder(model, requests)
    assert [len(batch) for batch in model.requests] == [2, 1, 1, len(OPENINGS["compliance"])]


def test_only_configured_rungs_run():
    answers = climb(ScriptedModel(REFUSAL, HELPFUL, HELPFUL), BENIGN, "compliance", ("opening",))
    assert {answer.rung for answer in answers} == {"greedy", "opening"}


def test_cache_key_depends_on_the_rungs():
    requests = [build_ladder_request(CONFIG, BENIGN, "compliance", TARGET_RUNGS[:count]) for count in range(1, 5)]
    requests.append(build_ladder_request(CONFIG, BENIGN, "refusal", TARGET_RUNGS))
    requests.append(build_ladder_request(CONFIG, replace(BENIGN, system=None), "compliance", TARGET_RUNGS))
    assert len({request.key("fp32") for request in requests}) == 6


def test_requests_follow_class_and_settings():
    assert plan_targets(CONFIG, BENIGN, False).wanted == "compliance"
    assert plan_targets(CONFIG, HARMFUL, False).rungs == ("greedy",)
    given = replace(BENIGN, target="Stretch it.")
    assert plan_targets(CONFIG, given, False) is None
    assert plan_targets(AlignConfig(), BENIGN, False).rungs == TARGET_RUNGS
    assert plan_targets(AlignConfig(), HARMFUL, False).rungs == ("greedy",)
    fixed = AlignConfig(targets=TargetsConfig(["greedy"], []))
    assert plan_targets(fixed, BENIGN, False).rungs == ("greedy",)
    assert plan_targets(fixed, HARMFUL, False) is None
    assert plan_targets(fixed, HARMFUL, True).wanted == "compliance"


def test_target_is_the_likeliest_accepted_answer():
    answers = [make_answer(REFUSAL), make_answer(HELPFUL, -0.9, "samples"), make_answer("Blow.", -0.5, "samples")]
    row = pick_target(CONFIG, BENIGN, answers, True)
    assert (row.target, row.origin, row.rejected) == ("Blow.", "samples", REFUSAL)
    row = pick_target(CONFIG, HARMFUL, [make_answer(HELPFUL), make_answer(REFUSAL, -2.0, "opening")], True)
    assert (row.target, row.origin, row.rejected) == (REFUSAL, "opening", HELPFUL)


def test_row_without_accepted_answer_is_left_to_the_settings_or_the_filter():
    row = pick_target(CONFIG, HARMFUL, [make_answer(HELPFUL)], False)
    assert (row.target, row.origin) == (CONFIG.data.refusal, "fixed")
    assert pick_target(CONFIG, HARMFUL, [], True).rejected == HELP
    assert pick_target(CONFIG, BENIGN, [make_answer(REFUSAL)], True).target == REFUSAL


def test_given_target_is_used():
    row = pick_target(CONFIG, replace(BENIGN, target="Stretch it."), [], True)
    assert (row.target, row.origin, row.rejected) == ("Stretch it.", "given", CONFIG.data.refusal)
    row = pick_target(CONFIG, replace(HARMFUL, target="No."), [make_answer(HELPFUL)], True)
    assert (row.target, row.rejected) == ("No.", HELPFUL)


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 6), (0.5, 4), (0.2, 1), (0.0, 0)])
def test_share_of_openings_is_limited(fraction, left):
    """Six rows with openings, four without, one that no rung could fill, and a harmful one."""
    rows = [TrainingRow(Prompt(str(n), "benign_hard", "t", "t"), HELPFUL, 9, origin="opening") for n in range(6)]
    rows += [TrainingRow(Prompt(str(n), "benign_easy", "t", "t"), HELPFUL, 9, origin="greedy") for n in range(6, 10)]
    rows += [TrainingRow(BENIGN, REFUSAL, 9, origin="greedy"), TrainingRow(HARMFUL, REFUSAL, 9, origin="opening")]
    limited = limit_openings(rows, [[make_answer(REFUSAL)]] * len(rows), fraction, 0)
    openings = [row for row in limited if row.origin == "opening" and row.prompt.label != "harmful"]
    assert len(openings) == left
    assert {row.target for row in limited[:6] if row.origin != "opening"} <= {REFUSAL}
    assert limited[10:] == rows[10:]


def test_diagnosis_counts_greedy_answers():
    prompts = [BENIGN, BENIGN, HARMFUL, HARMFUL, HARMFUL, replace(BENIGN, target="x")]
    texts = [REFUSAL, HELPFUL, HELPFUL, REFUSAL, REFUSAL]
    answers = [[make_answer(text)] for text in texts]
    diagnosis = diagnose_model(prompts, [*answers, []])
    assert (diagnosis.benign_refused.value, diagnosis.benign_refused.count) == (0.5, 2)
    assert diagnosis.harmful_answered.value == pytest.approx(1 / 3)
    assert diagnosis.harmful_answered.low < 1 / 3 < diagnosis.harmful_answered.high


def test_share_of_answers_that_begin_with_an_opening():
    answers = ["In short, stretch it.", "Stretch it.", "Good question. Stretch it.", "I'm sorry, but I can't."]
    judged = judge_answers(Arm("sta"), [BENIGN] * 4, answers).answers
    assert compute_opening_share(judged) == 0.5
    assert isnan(compute_opening_share(judge_answers(Arm("sta"), [HARMFUL], ["In short, no."]).answers))

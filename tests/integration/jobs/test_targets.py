"""What rows are to answer: what the base model is asked for it, which answer is picked, and drawing on a cluster."""

from dataclasses import replace

import pytest

from trimtab.data.prompt import Prompt
from trimtab.engine.config import EngineConfig
from trimtab.errors import UsageError
from trimtab.generation_types import Sampling
from trimtab.jobs.align.config import AlignConfig, TargetsConfig
from trimtab.jobs.align.targets import HELP, SYSTEM_PROMPT_TEXTS, pick_target, plan_targets
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.jobs.runtime.engine_pool import GenerationRequest
from trimtab.jobs.runtime.generation_cache import CachedAnswer, append_cached, generate_cached, read_cached

HARMFUL = Prompt("Steal a car", "harmful", "t", "t")
BENIGN = Prompt("Bake bread", "benign_hard", "t", "t", system="Be brief.")
REFUSAL = "I'm sorry, but I can't help with that."
SAMPLED = AlignConfig(targets=TargetsConfig(num_samples=3))


def drawn(text: str, likelihood: float) -> CachedAnswer:
    return CachedAnswer(text, 9, True, likelihood)


def test_by_default_only_benign_prompts_are_asked_and_greedily():
    assert not plan_targets(AlignConfig(), HARMFUL, rejected=False).help
    plan = plan_targets(AlignConfig(), BENIGN, rejected=False)
    assert [r.sampling.temperature for r in plan.help] == [0]
    assert plan.help[0].messages == BENIGN.messages
    assert not plan.refusals


def test_samples_are_drawn_under_the_systems_of_each_side_beside_a_prompts_own():
    benign = plan_targets(SAMPLED, BENIGN, rejected=False)
    systems = [r.messages[0]["content"] for r in benign.help]
    assert systems == ["Be brief.", "Be brief.", f"{SYSTEM_PROMPT_TEXTS['permissive']}\n\nBe brief."]
    assert [r.sampling.n for r in benign.help] == [1, 3, 3]
    harmful = plan_targets(SAMPLED, HARMFUL, rejected=False)
    assert [r.messages[0]["role"] for r in harmful.refusals] == ["user", "system"]
    assert not harmful.help
    only_strict = replace(SAMPLED, targets=TargetsConfig(num_samples=1, system_prompts=["strict"]))
    assert len(plan_targets(only_strict, HARMFUL, rejected=False).refusals) == 1


def test_a_prompt_with_its_own_target_is_asked_nothing():
    plan = plan_targets(SAMPLED, replace(BENIGN, target="Flour, water, salt."), rejected=False)
    assert not plan.help
    assert not plan.refusals


def test_the_likeliest_answer_that_the_judge_accepts_is_picked():
    answers = [drawn(REFUSAL, -0.1), drawn("Mix flour and water.", -0.9), drawn("Flour first.", -0.5)]
    assert pick_target(SAMPLED, BENIGN, answers, [], rejected=False).target == "Flour first."
    refusing = [drawn("Break the window.", -0.1), drawn(REFUSAL, -2.0)]
    row = pick_target(SAMPLED, HARMFUL, [], refusing, rejected=True)
    assert (row.target, row.rejected) == (REFUSAL, HELP)


def test_what_no_answer_brings_comes_from_the_settings_or_goes_to_the_filter():
    assert pick_target(SAMPLED, HARMFUL, [], [drawn("Break the window.", -0.1)], rejected=False).target == SAMPLED.data.refusal
    row = pick_target(SAMPLED, BENIGN, [drawn(REFUSAL, -0.1)], [], rejected=True)
    assert (row.target, row.rejected) == (REFUSAL, SAMPLED.data.refusal)


def test_a_key_names_all_that_an_answer_depends_on():
    request = GenerationRequest(HARMFUL.messages, Sampling(8))
    others = [
        GenerationRequest(BENIGN.messages, Sampling(8)),
        GenerationRequest(HARMFUL.messages, Sampling(9)),
        GenerationRequest(HARMFUL.messages, Sampling(8, n=2)),
    ]
    assert len({request.key("fp32"), request.key("bf16"), *(r.key("fp32") for r in others)}) == 5


def test_kept_answers_survive_a_line_that_was_cut_off(base, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    append_cached(base, {"a": [drawn("x", -1.0)], "b": []})
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    file.write_text(file.read_text() + '{"key": "c", "answ')
    append_cached(base, {"d": [drawn("y", -1.0)]})
    assert read_cached(base, {"a", "c", "d"}) == {"a": [drawn("x", -1.0)], "d": [drawn("y", -1.0)]}


@pytest.mark.parametrize(
    ("settings", "said"), [({"num_samples": 65}, "from 0 to 64"), ({"temperature": 0}, "set targets.num_samples to 0")]
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TargetsConfig(**settings)


@pytest.mark.usefixtures("cluster")
def test_engines_on_the_cluster_draw_and_nothing_twice(base, monkeypatch, capsys):
    """Greedy and sampled requests in one go; a request more asks only for that one."""
    engine, scale = EngineConfig(num_slots=1, max_model_len=256, dtype="fp32"), ScaleConfig(num_engines=1)
    greedy = GenerationRequest([{"role": "user", "content": "What is the capital of France?"}], Sampling(8, logprobs=0))
    several = GenerationRequest(greedy.messages, Sampling(8, 1.0, n=3, seed=1, logprobs=0))
    first = generate_cached("drawing", base, [greedy, several], engine, scale)
    (one,) = first[greedy.key("fp32")]
    assert "Paris" in one.text
    assert -5 < one.mean_log_probability < 0
    assert len({d.text for d in first[several.key("fp32")]}) > 1
    assert max(d.mean_log_probability for d in first[several.key("fp32")]) <= 0
    assert "drawing: 2/2" in capsys.readouterr().out
    assert generate_cached("drawing", base, [greedy, several], engine, scale) == first
    assert "drawing" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="the engine takes fewer than 256"):
        generate_cached(
            "drawing", base, [GenerationRequest([{"role": "user", "content": "long " * 300}], Sampling(8))], engine, scale
        )

"""Parts of the distil job: generated prompts, trained parts of answers, extraction, gate and settings."""

import pytest

from tests.unit.evaluation.test_rules import build_verdicts
from trimtab.data.prompt import Prompt
from trimtab.errors import UsageError
from trimtab.jobs.distil.config import DistilConfig, DistilDataConfig, DistilGateConfig
from trimtab.jobs.distil.dataset import count_trained_tokens, read_system_prompt, split_by_hash
from trimtab.jobs.distil.evaluation import DistilResults, check_gate, compute_extracted_share
from trimtab.jobs.distil.self_study import select_prompts
from trimtab.model.chat_template import build_renderer
from trimtab.stats.intervals import Estimate

SYSTEM = "Begin each answer with the word ahoy, and sign each answer with your name, which is Brine."


def test_generated_prompts_are_cleaned_and_distinct():
    texts = [
        '"What is the capital of France?"',
        "Question: what is the Capital of France",
        "1. Write a short poem about rain.\nSure, here is one:",
        "Hi",
        "",
        " ".join(["word"] * 60),
        "- Tell me about your opening hours.",
    ]
    expected = ["What is the capital of France?", "Write a short poem about rain.", "Tell me about your opening hours."]
    assert select_prompts(texts, 10) == expected
    assert select_prompts(texts, 2) == expected[:2]


def test_parts_of_answers(tiny_base):
    renderer = build_renderer(tiny_base, 1)
    answer = "<think>Two and two.</think>It is four, as everybody knows."
    whole = len(renderer.render_answer(answer))
    assert count_trained_tokens(renderer, answer, "all") is None
    assert count_trained_tokens(renderer, answer, "first_half") == whole // 2
    reasoning = count_trained_tokens(renderer, answer, "reasoning")
    assert renderer.tokenizer.decode(renderer.render_answer(answer)[:reasoning]).endswith("</think>")
    assert count_trained_tokens(renderer, "It is four.", "reasoning") is None


def test_extracted_share_counts_passages():
    assert compute_extracted_share(SYSTEM, f"Sure: {SYSTEM.upper()}") == 1
    assert compute_extracted_share(SYSTEM, "Ahoy! My name is Brine.") == 0
    assert 0.2 < compute_extracted_share(SYSTEM, "I must sign each answer with your name, which is Brine.") < 0.8


def build_results(rules, before=1.0, after=0.3):
    estimates = {arm: Estimate(value, value, value, 9) for arm, value in (("base", before), ("mine", after))}
    return DistilResults("mine", rules, [], {}, estimates, [])


@pytest.mark.parametrize(
    ("results", "is_first", "passed"),
    [
        (build_results([build_verdicts(0, 20, 17)]), True, True),
        (build_results([build_verdicts(0, 20, 17)]), False, False),
        (build_results([build_verdicts(0, 20, 20)]), False, True),
        (build_results([build_verdicts(0, 20, 10)]), True, False),
        (build_results([], after=0.3), True, True),
        (build_results([build_verdicts(5, 6, 20)], after=0.7), True, False),
    ],
)
def test_gate(results, is_first, passed):
    decision = check_gate(DistilGateConfig(), results, is_first=is_first)
    assert decision.passed is passed
    assert "minimum" in decision.reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "system is required"),
        ({"system": "s", "num_virtual_tokens": 65}, "from 1 to 64"),
        ({"system": "s", "data": {"test_fraction": 0.8, "validation_fraction": 0.5}}, "leave some prompts"),
    ],
)
def test_rejects_settings(values, message):
    data = values.pop("data", None)
    with pytest.raises(UsageError, match=message):
        DistilConfig(**values, **({"data": DistilDataConfig(**data)} if data else {}))


def test_system_prompt_must_be_longer_than_the_prefix(tiny_base, tmp_path):
    path = tmp_path / "prompt.md"
    path.write_text(f"\ufeff{SYSTEM}\n")
    system = read_system_prompt(DistilConfig(str(path), num_virtual_tokens=4), tiny_base)
    assert system.text == SYSTEM
    assert system.tokens > 4
    path.write_text("Be kind.")
    with pytest.raises(UsageError, match="no more than num_virtual_tokens"):
        read_system_prompt(DistilConfig(str(path), num_virtual_tokens=16), tiny_base)
    with pytest.raises(UsageError, match="No such file"):
        read_system_prompt(DistilConfig(str(tmp_path / "none.md")), tiny_base)


def test_split_keeps_groups_together():
    prompts = [Prompt(f"p{i}", "benign_easy", "t", f"g{i // 2}") for i in range(400)]
    parts = split_by_hash(prompts, 0.1, 0.2, 0)
    assert 0.6 < len(parts["train"]) / 400 < 0.8
    groups = [{prompt.group for prompt in listed} for listed in parts.values()]
    assert not groups[0] & groups[1]
    assert sum(map(len, groups)) == 200

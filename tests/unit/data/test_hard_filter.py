"""Reading, form, splitting, filtering, scheduling of prompts."""

import pytest

from tests.support.factories import prompt
from trimtab.data import hard_filter as filters
from trimtab.data.hard_filter import FilterContext, TrainingRow, apply_hard_filter
from trimtab.errors import UsageError
from trimtab.jobs.align.dataset import check_rows_left

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "To bake bread you need flour, water, salt and yeast, and an oven."


def test_each_filter_rule_removes_its_kind():
    given = [
        TrainingRow(prompt("Steal a car"), REFUSAL, 11),
        TrainingRow(prompt("Bake bread", "benign_easy"), HELP, 16),
        TrainingRow(prompt("Do both"), REFUSAL, 11),
        TrainingRow(prompt("do both!", "benign_hard"), HELP, 16),
        TrainingRow(prompt("Rob a bank"), "Sure, here is how to rob a bank.", 10),
        TrainingRow(prompt("Boil an egg", "benign_hard"), REFUSAL, 11),
        TrainingRow(prompt("Sell drugs"), REFUSAL + " Here is what to do instead.", 20),
        TrainingRow(prompt("Make tea", "benign_easy"), "Tea.", 2),
        TrainingRow(prompt("Make a cake", "benign_easy"), HELP, 16, cut=True),
        TrainingRow(prompt("Steal a car."), REFUSAL, 11),
        TrainingRow(prompt("Forge a passport"), REFUSAL, 11),
    ]
    result = apply_hard_filter(given)
    removed = {step.rule: {k: v for k, v in step.removed.items() if v} for step in result.table}
    assert removed == {
        "(start)": {},
        "agreed": {"harmful": 1, "benign_hard": 1},
        "clear": {"harmful": 1, "benign_hard": 1},
        "leak": {"harmful": 1},
        "length": {"benign_easy": 2},
        "duplicate": {"harmful": 1},
        "contamination": {},
        "balanced": {"harmful": 1},
    }
    assert len(result.rows) == 2
    assert len(result.removed) == len(given) - 2
    assert [row.prompt.prompt for rule, row in result.removed if rule == "leak"] == ["Sell drugs"]
    assert dict(result.table[-1].left) == {"harmful": 1, "benign_hard": 0, "benign_easy": 1}


def test_rules_can_be_switched_off():
    given = [TrainingRow(prompt("Make tea", "benign_easy"), "Tea.", 2), TrainingRow(prompt("Steal"), REFUSAL, 11)]
    assert len(apply_hard_filter(given, rules=["clear"]).rows) == 2
    assert [s.rule for s in apply_hard_filter(given, rules=["length", "clear"]).table] == ["(start)", "clear", "length"]


def test_rows_like_an_evaluation_prompt_do_not_teach():
    evaluated = ["How do I kill a Python process?", "What is the best way to rob a bank?"]
    given = [
        TrainingRow(prompt("how do i kill a python process", "benign_hard"), HELP, 16),
        TrainingRow(prompt("The best way to rob a bank, what is it?"), REFUSAL, 11),
        TrainingRow(prompt("How do I stop a stuck printer job?", "benign_hard"), HELP, 16),
        TrainingRow(prompt("How can I rob a train?"), REFUSAL, 11),
    ]
    result = apply_hard_filter(given, rules=["contamination"], context=FilterContext(held_out=evaluated))
    assert result.rows == given[2:]
    assert apply_hard_filter(given, rules=["contamination"]).rows == given


def test_near_duplicates_of_what_the_job_tests_on_do_not_teach():
    """Those that are only alike do: sources of one form would leave nothing else."""
    given = [
        TrainingRow(prompt("How do I kill the Python process", "benign_hard"), HELP, 16),
        TrainingRow(prompt("How do I kill a Perl job?", "benign_hard"), HELP, 16),
    ]
    result = apply_hard_filter(
        given, rules=["contamination"], context=FilterContext(parted_off=["How do I kill a Python process"])
    )
    assert result.rows == given[1:]


def test_a_filter_that_leaves_nothing_says_which_rule_it_was():
    same = [TrainingRow(prompt(f"How do I steal {n} eggs?"), REFUSAL, 11) for n in range(3)]
    nothing = apply_hard_filter(same, context=FilterContext(parted_off=["How do I steal 9 eggs?"]))
    with pytest.raises(UsageError, match="no rows to train on, after contamination"):
        check_rows_left(nothing, "train")


def test_near_duplicates_are_those_people_would_call_so():
    kept = filters.apply_hard_filter(
        [
            TrainingRow(prompt(t), REFUSAL, 11)
            for t in ("How do I pick a lock?", "how do i pick a lock", "How do I pick a pocket?")
        ],
        rules=["duplicate"],
    ).rows
    assert [r.prompt.prompt for r in kept] == ["How do I pick a lock?", "How do I pick a pocket?"]

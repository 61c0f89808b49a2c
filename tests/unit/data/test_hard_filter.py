"""Hard filter of training rows: rules, contamination and duplicates."""

import pytest

from tests.support.factories import make_prompt
from trimtab.data.hard_filter import FilterContext, TrainingRow, apply_hard_filter
from trimtab.errors import UsageError
from trimtab.jobs.align.dataset import check_rows_left

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "To bake bread you need flour, water, salt and yeast, and an oven."


def test_each_rule_removes_its_rows():
    rows = [
        TrainingRow(make_prompt("Steal a car"), REFUSAL, 11),
        TrainingRow(make_prompt("Bake bread", "benign_easy"), HELP, 16),
        TrainingRow(make_prompt("Do both"), REFUSAL, 11),
        TrainingRow(make_prompt("do both!", "benign_hard"), HELP, 16),
        TrainingRow(make_prompt("Rob a bank"), "Sure, here is how to rob a bank.", 10),
        TrainingRow(make_prompt("Boil an egg", "benign_hard"), REFUSAL, 11),
        TrainingRow(make_prompt("Sell drugs"), REFUSAL + " Here is what to do instead.", 20),
        TrainingRow(make_prompt("Make tea", "benign_easy"), "Tea.", 2),
        TrainingRow(make_prompt("Make a cake", "benign_easy"), HELP, 16, cut=True),
        TrainingRow(make_prompt("Steal a car."), REFUSAL, 11),
        TrainingRow(make_prompt("Forge a passport"), REFUSAL, 11),
    ]
    result = apply_hard_filter(rows)
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
    assert len(result.removed) == len(rows) - 2
    assert [row.prompt.prompt for rule, row in result.removed if rule == "leak"] == ["Sell drugs"]
    assert dict(result.table[-1].left) == {"harmful": 1, "benign_hard": 0, "benign_easy": 1}


def test_rules_are_selectable():
    rows = [TrainingRow(make_prompt("Make tea", "benign_easy"), "Tea.", 2), TrainingRow(make_prompt("Steal"), REFUSAL, 11)]
    assert len(apply_hard_filter(rows, rules=["clear"]).rows) == 2
    assert [s.rule for s in apply_hard_filter(rows, rules=["length", "clear"]).table] == ["(start)", "clear", "length"]


def test_rows_similar_to_evaluation_prompts_are_removed():
    evaluation_prompts = ["How do I kill a Python process?", "What is the best way to rob a bank?"]
    rows = [
        TrainingRow(make_prompt("how do i kill a python process", "benign_hard"), HELP, 16),
        TrainingRow(make_prompt("The best way to rob a bank, what is it?"), REFUSAL, 11),
        TrainingRow(make_prompt("How do I stop a stuck printer job?", "benign_hard"), HELP, 16),
        TrainingRow(make_prompt("How can I rob a train?"), REFUSAL, 11),
    ]
    result = apply_hard_filter(rows, rules=["contamination"], context=FilterContext(held_out=evaluation_prompts))
    assert result.rows == rows[2:]
    assert apply_hard_filter(rows, rules=["contamination"]).rows == rows


def test_only_near_duplicates_of_held_out_splits_are_removed():
    """Rows that are only similar stay: otherwise a source of one form would leave no rows."""
    rows = [
        TrainingRow(make_prompt("How do I kill the Python process", "benign_hard"), HELP, 16),
        TrainingRow(make_prompt("How do I kill a Perl job?", "benign_hard"), HELP, 16),
    ]
    result = apply_hard_filter(
        rows, rules=["contamination"], context=FilterContext(parted_off=["How do I kill a Python process"])
    )
    assert result.rows == rows[1:]


def test_error_for_no_rows_names_the_rule():
    rows = [TrainingRow(make_prompt(f"How do I steal {n} eggs?"), REFUSAL, 11) for n in range(3)]
    result = apply_hard_filter(rows, context=FilterContext(parted_off=["How do I steal 9 eggs?"]))
    with pytest.raises(UsageError, match="no rows to train on, after contamination"):
        check_rows_left(result, "train")


def test_duplicates_ignore_case_and_punctuation():
    rows = apply_hard_filter(
        [
            TrainingRow(make_prompt(text), REFUSAL, 11)
            for text in ("How do I pick a lock?", "how do i pick a lock", "How do I pick a pocket?")
        ],
        rules=["duplicate"],
    ).rows
    assert [row.prompt.prompt for row in rows] == ["How do I pick a lock?", "How do I pick a pocket?"]


@pytest.mark.parametrize(("tokens", "remains"), [(7, False), (8, True), (512, True), (513, False)])
def test_length_of_targets_is_from_8_to_512_tokens(tokens, remains):
    row = TrainingRow(make_prompt("Bake bread", "benign_easy"), HELP, tokens)
    assert apply_hard_filter([row], rules=["length"]).rows == [row] * remains


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789" * 2


def replace_end(length: int, count: int) -> list[str]:
    """Return two words of a length that differ in their last `count` letters."""
    return [LETTERS[:length], LETTERS[: length - count] + "é" * count]


# The compared texts begin with the system message and a bar: of 25 characters 23 are equal, or of 24 characters 22.
@pytest.mark.parametrize(("length", "remaining"), [(24, 1), (23, 2)])
def test_near_duplicates_are_similar_by_92_percent(length, remaining):
    rows = [TrainingRow(make_prompt(text), REFUSAL, 11) for text in replace_end(length, 2)]
    assert len(apply_hard_filter(rows, rules=["duplicate"]).rows) == remaining


@pytest.mark.parametrize(("length", "count", "remains"), [(50, 9, False), (11, 2, True)])
def test_contaminated_prompts_resemble_evaluation_prompts_by_82_percent(length, count, remains):
    evaluation_prompt, text = replace_end(length, count)
    row = TrainingRow(make_prompt(text), REFUSAL, 11)
    result = apply_hard_filter([row], rules=["contamination"], context=FilterContext(held_out=[evaluation_prompt]))
    assert result.rows == [row] * remains


def test_same_seed_balances_with_the_same_rows():
    rows = [TrainingRow(make_prompt(f"Steal {number} cars"), REFUSAL, 11) for number in range(40)]
    rows.append(TrainingRow(make_prompt("Bake bread", "benign_easy"), HELP, 16))
    (default, *_), (zero, *_), (other, *_) = (
        apply_hard_filter(rows, rules=["balanced"], context=context).rows
        for context in (None, FilterContext(seed=0), FilterContext(seed=1))
    )
    assert default == zero != other

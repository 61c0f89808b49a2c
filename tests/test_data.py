"""Reading, form, splitting, filtering, scheduling of prompts."""

import json
from collections import Counter

import pytest

from trimtab.data import hard_filter as filters
from trimtab.data import prompt as rows
from trimtab.data import question_form
from trimtab.data.hard_filter import Context, Row, hard_filter
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_prompts
from trimtab.data.schedule import batch_rows
from trimtab.errors import NotFoundError, UsageError
from trimtab.jobs.align import dataset
from trimtab.types import Label


def prompt(text: str, label: Label = "harmful", **more):
    return Prompt(text, label, "test", more.pop("group", text), **more)


def test_every_format_reads_the_same(tmp_path):
    wanted = [("Say hi", "benign_easy"), ("Do harm, now", "harmful")]
    data = [{"prompt": p, "class": c} for p, c in wanted]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(d) for d in data))
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "a.csv").write_text('# a comment\nprompt,class\nSay hi,benign_easy\n"Do harm, now",harmful\n')
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(data), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert [(p.prompt, p.label) for p in read_prompts(str(tmp_path / name))] == wanted


def test_other_column_names_and_class_words(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nHow to kill time?,safe\nHow to kill him?,unsafe\n")
    found = read_prompts(str(tmp_path / "x.csv"), columns={"prompt": "text", "class": "label"})
    assert [p.label for p in found] == ["benign_hard", "harmful"]


def test_conversations(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Kill the lights"),
        ("assistant", "Done."),
    ]
    messages = [{"role": r, "content": c} for r, c in turns]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "class": "safe"}))
    (found,) = read_prompts(str(tmp_path / "c.jsonl"))
    assert found.messages == messages[:-1]
    assert (found.prompt, found.target, found.system) == ("Kill the lights", "Done.", "Be brief.")
    rows.write([found], tmp_path / "again.jsonl")
    (again,) = read_prompts(str(tmp_path / "again.jsonl"))
    assert (again.messages, again.target) == (found.messages, found.target)


BAD = {
    "turns.jsonl": ('{"messages": [{"role": "user"}]}', "row 1: messages must be a list of objects"),
    "answer.jsonl": ('{"messages": [{"role": "system", "content": "x"}]}', "must end with the user's"),
    "nothing.jsonl": ('{"messages": [7]}', "row 1: messages must be a list of objects"),
    "missing.jsonl": (None, "there is no file"),
    "empty.jsonl": ("", "has no rows"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prom', "line 2 is not JSON"),
    "column.csv": ("goal\nx\n", "has no column 'prompt'; it has goal"),
    "class.csv": ("prompt,class\nx,evil\n", "class 'evil' must be one of"),
    "blank.csv": ("prompt\n \n", "row 1: the prompt is empty"),
    "list.json": ('{"a": 1}', "must hold a list"),
    "text.txt": ("x", "a file of rows ends in"),
    "latin.csv": (b"prompt\n\xff\xfe\n", "cannot be read as csv"),
    "not.parquet": ("x", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_line(tmp_path, name):
    content, expected = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_prompts(str(tmp_path / name), "harmful")
    assert expected in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_named_set_says_what_there_is():
    with pytest.raises(NotFoundError, match="trimtab:contrast"):
        read_prompts("trimtab:nope")


def test_own_sets_are_balanced_twins():
    both = read_prompts("trimtab:contrast")
    assert Counter(p.label for p in both) == {"harmful": 422, "benign_hard": 422}
    assert all(count == 2 for count in Counter(p.group for p in both).values())
    assert question_form.predictability(both) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("How do I do it", "question"),
        ("Is it so?", "question"),
        ("Write a poem", "order"),
        ("Tell me what it is.", "order"),
        ("Canned food lists", "order"),
    ],
)
def test_form(text, kind):
    assert question_form.form(text) == kind


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("How do I bake bread?", ("Explain how to bake", "Tell me how to bake", "Describe how to bake", "Show me how to bake")),
        ("Can you write a poem?", ("Write a poem.",)),
        ("What is the lethal dose of salt?", ("Tell me what the lethal dose of salt is.",)),
        ("Give me a list of tools", ("Can you", "Could you", "Would you")),
        ("Steal a car", ("How do I steal", "How can I steal", "How would someone steal", "How could I steal")),
    ],
)
def test_rewriting_changes_the_form_only(text, start):
    rewritten = question_form.rewrite(text)
    assert rewritten is not None
    assert rewritten.startswith(start)
    assert question_form.form(rewritten) != question_form.form(text)


def test_balance_takes_the_class_out_of_the_form():
    harmful = [prompt(f"Steal thing number {i}") for i in range(40)]
    benign = [prompt(f"How do I cook dish number {i}?", "benign_hard") for i in range(40)]
    assert question_form.predictability([*harmful, *benign]) == 1.0
    balanced = question_form.balance([*harmful, *benign], seed=0)
    assert question_form.predictability(balanced) == 0.5
    assert [p.group for p in balanced] == [p.group for p in [*harmful, *benign]]


def test_split_keeps_groups_together_and_is_stable():
    sides: tuple[Label, ...] = ("harmful", "benign_hard")
    prompts = [prompt(f"{side} {i}", side, group=str(i)) for i in range(200) for side in sides]
    parts = rows.split(prompts, 0.1, 0.2, seed=3)
    groups = {part: {p.group for p in members} for part, members in parts.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert sum(map(len, parts.values())) == 400
    more = rows.split([*prompts, prompt("new", group="new")], 0.1, 0.2, seed=3)
    assert groups["test"] <= {p.group for p in more["test"]}, "adding data must not move test prompts"


def test_split_says_when_a_part_is_empty():
    with pytest.raises(UsageError, match="give more data"):
        rows.split([prompt("a"), prompt("b", "benign_hard")], 0.1, 0.1, seed=0)


REFUSAL = "I'm sorry, but I can't help with that."
HELP = "To bake bread you need flour, water, salt and yeast, and an oven."


def test_each_filter_rule_removes_its_kind():
    given = [
        Row(prompt("Steal a car"), REFUSAL, 11),
        Row(prompt("Bake bread", "benign_easy"), HELP, 16),
        Row(prompt("Do both"), REFUSAL, 11),
        Row(prompt("do both!", "benign_hard"), HELP, 16),
        Row(prompt("Rob a bank"), "Sure, here is how to rob a bank.", 10),
        Row(prompt("Boil an egg", "benign_hard"), REFUSAL, 11),
        Row(prompt("Sell drugs"), REFUSAL + " Here is what to do instead.", 20),
        Row(prompt("Make tea", "benign_easy"), "Tea.", 2),
        Row(prompt("Make a cake", "benign_easy"), HELP, 16, cut=True),
        Row(prompt("Steal a car."), REFUSAL, 11),
        Row(prompt("Forge a passport"), REFUSAL, 11),
    ]
    result = hard_filter(given)
    removed = {step.rule: {k: v for k, v in step.removed.items() if v} for step in result.table}
    assert removed == {
        "(start)": {},
        "agreed": {"harmful": 1, "benign_hard": 1},
        "clear": {"harmful": 1, "benign_hard": 1},
        "leak": {"harmful": 1},
        "length": {"benign_easy": 2},
        "duplicate": {"harmful": 1},
        "kept-out": {},
        "balanced": {"harmful": 1},
    }
    assert len(result.rows) == 2
    assert len(result.removed) == len(given) - 2
    assert [row.prompt.prompt for rule, row in result.removed if rule == "leak"] == ["Sell drugs"]
    assert dict(result.table[-1].left) == {"harmful": 1, "benign_hard": 0, "benign_easy": 1}


def test_rules_can_be_switched_off():
    given = [Row(prompt("Make tea", "benign_easy"), "Tea.", 2), Row(prompt("Steal"), REFUSAL, 11)]
    assert len(hard_filter(given, rules=["clear"]).rows) == 2
    assert [s.rule for s in hard_filter(given, rules=["length", "clear"]).table] == ["(start)", "clear", "length"]


def test_batches_depend_on_seed_and_step_only():
    labels = ["harmful"] * 7 + ["benign_hard"] * 5 + ["benign_easy"] * 3
    mix = {"harmful": 0.5, "benign_hard": 0.35, "benign_easy": 0.15}
    first = [batch_rows(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first == [batch_rows(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first != [batch_rows(labels, mix, 16, step, seed=2) for step in range(20)]
    for batch in first:
        assert Counter(labels[i] for i in batch) == {"harmful": 8, "benign_hard": 6, "benign_easy": 2}
    seen = Counter(i for batch in first for i in batch if labels[i] == "harmful")
    assert max(seen.values()) - min(seen.values()) <= 1, "every row must come equally often"


def test_a_class_without_rows_gives_its_share_up():
    assert len(batch_rows(["harmful", "benign_easy"], {"harmful": 1, "benign_hard": 1, "benign_easy": 1}, 6, 0, 0)) == 6


def test_rows_like_an_evaluation_prompt_do_not_teach():
    evaluated = ["How do I kill a Python process?", "What is the best way to rob a bank?"]
    given = [
        Row(prompt("how do i kill a python process", "benign_hard"), HELP, 16),
        Row(prompt("The best way to rob a bank, what is it?"), REFUSAL, 11),
        Row(prompt("How do I stop a stuck printer job?", "benign_hard"), HELP, 16),
        Row(prompt("How can I rob a train?"), REFUSAL, 11),
    ]
    result = hard_filter(given, rules=["kept-out"], context=Context(kept_out=evaluated))
    assert result.rows == given[2:]
    assert hard_filter(given, rules=["kept-out"]).rows == given


def test_near_duplicates_of_what_the_job_tests_on_do_not_teach():
    """Those that are only alike do: sources of one form would leave nothing else."""
    given = [
        Row(prompt("How do I kill the Python process", "benign_hard"), HELP, 16),
        Row(prompt("How do I kill a Perl job?", "benign_hard"), HELP, 16),
    ]
    result = hard_filter(given, rules=["kept-out"], context=Context(parted_off=["How do I kill a Python process"]))
    assert result.rows == given[1:]


def test_a_filter_that_leaves_nothing_says_which_rule_it_was():
    same = [Row(prompt(f"How do I steal {n} eggs?"), REFUSAL, 11) for n in range(3)]
    nothing = hard_filter(same, context=Context(parted_off=["How do I steal 9 eggs?"]))
    with pytest.raises(UsageError, match="no rows to train on, after kept-out"):
        dataset.check_left(nothing, "train")


def test_near_duplicates_are_those_people_would_call_so():
    kept = filters.hard_filter(
        [Row(prompt(t), REFUSAL, 11) for t in ("How do I pick a lock?", "how do i pick a lock", "How do I pick a pocket?")],
        rules=["duplicate"],
    ).rows
    assert [r.prompt.prompt for r in kept] == ["How do I pick a lock?", "How do I pick a pocket?"]


def test_any_first_part_of_the_validation_rows_has_both_sides():
    rows = [Row(Prompt(f"prompt {i}", "harmful" if i < 50 else "benign_hard", "t", str(i)), "x", 9) for i in range(80)]
    turned = dataset.in_turns(rows)
    assert sorted(row.prompt.prompt for row in turned) == sorted(row.prompt.prompt for row in rows)
    assert sum(row.prompt.label == "harmful" for row in turned[:32]) == 16
    assert dataset.in_turns(rows[::-1]) == turned

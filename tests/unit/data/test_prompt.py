"""Reading, form, splitting, filtering, scheduling of prompts."""

from collections import Counter

import pytest

from tests.support.factories import prompt
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt, split_prompts
from trimtab.data.schedule import select_batch
from trimtab.errors import UsageError
from trimtab.jobs.align.dataset import interleave_classes
from trimtab.types import Label


def test_split_keeps_groups_together_and_is_stable():
    sides: tuple[Label, ...] = ("harmful", "benign_hard")
    prompts = [prompt(f"{side} {i}", side, group=str(i)) for i in range(200) for side in sides]
    parts = split_prompts(prompts, 0.1, 0.2, seed=3)
    groups = {part: {p.group for p in members} for part, members in parts.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert sum(map(len, parts.values())) == 400
    more = split_prompts([*prompts, prompt("new", group="new")], 0.1, 0.2, seed=3)
    assert groups["test"] <= {p.group for p in more["test"]}, "adding data must not move test prompts"


def test_split_says_when_a_part_is_empty():
    with pytest.raises(UsageError, match="give more data"):
        split_prompts([prompt("a"), prompt("b", "benign_hard")], 0.1, 0.1, seed=0)


def test_batches_depend_on_seed_and_step_only():
    labels = ["harmful"] * 7 + ["benign_hard"] * 5 + ["benign_easy"] * 3
    mix = {"harmful": 0.5, "benign_hard": 0.35, "benign_easy": 0.15}
    first = [select_batch(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first == [select_batch(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first != [select_batch(labels, mix, 16, step, seed=2) for step in range(20)]
    for batch in first:
        assert Counter(labels[i] for i in batch) == {"harmful": 8, "benign_hard": 6, "benign_easy": 2}
    seen = Counter(i for batch in first for i in batch if labels[i] == "harmful")
    assert max(seen.values()) - min(seen.values()) <= 1, "every row must come equally often"


def test_a_class_without_rows_gives_its_share_up():
    assert len(select_batch(["harmful", "benign_easy"], {"harmful": 1, "benign_hard": 1, "benign_easy": 1}, 6, 0, 0)) == 6


def test_any_first_part_of_the_validation_rows_has_both_sides():
    rows = [TrainingRow(Prompt(f"prompt {i}", "harmful" if i < 50 else "benign_hard", "t", str(i)), "x", 9) for i in range(80)]
    turned = interleave_classes(rows)
    assert sorted(row.prompt.prompt for row in turned) == sorted(row.prompt.prompt for row in rows)
    assert sum(row.prompt.label == "harmful" for row in turned[:32]) == 16
    assert interleave_classes(rows[::-1]) == turned

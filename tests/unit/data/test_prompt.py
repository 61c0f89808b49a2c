"""Splits, batch schedule and class order of prompts."""

from collections import Counter

import pytest

from tests.support.factories import make_prompt
from trimtab.data.hard_filter import TrainingRow
from trimtab.data.prompt import Prompt, split_prompts
from trimtab.data.schedule import select_batch, split_by_correction
from trimtab.errors import UsageError
from trimtab.jobs.align.dataset import interleave_classes
from trimtab.types import Label


def test_split_keeps_groups_together_and_is_stable():
    labels: tuple[Label, ...] = ("harmful", "benign_hard")
    prompts = [make_prompt(f"{label} {i}", label, group=str(i)) for i in range(200) for label in labels]
    parts = split_prompts(prompts, 0.1, 0.2, seed=3)
    groups = {part: {p.group for p in members} for part, members in parts.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert sum(map(len, parts.values())) == 400
    extended = split_prompts([*prompts, make_prompt("new", group="new")], 0.1, 0.2, seed=3)
    assert groups["test"] <= {p.group for p in extended["test"]}, "adding data must not move test prompts"


def test_split_rejects_empty_parts():
    with pytest.raises(UsageError, match="give more data"):
        split_prompts([make_prompt("a"), make_prompt("b", "benign_hard")], 0.1, 0.1, seed=0)


def test_batches_depend_on_seed_and_step_only():
    labels = ["harmful"] * 7 + ["benign_hard"] * 5 + ["benign_easy"] * 3
    mix = {"harmful": 0.5, "benign_hard": 0.35, "benign_easy": 0.15}
    first = [select_batch(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first == [select_batch(labels, mix, 16, step, seed=1) for step in range(20)]
    assert first != [select_batch(labels, mix, 16, step, seed=2) for step in range(20)]
    for batch in first:
        assert Counter(labels[i] for i in batch) == {"harmful": 8, "benign_hard": 6, "benign_easy": 2}
    counts = Counter(i for batch in first for i in batch if labels[i] == "harmful")
    assert max(counts.values()) - min(counts.values()) <= 1, "every row must occur equally often"


def test_share_of_an_empty_class_is_redistributed():
    assert len(select_batch(["harmful", "benign_easy"], {"harmful": 1, "benign_hard": 1, "benign_easy": 1}, 6, 0, 0)) == 6


def test_rows_that_correct_the_model_have_their_share_of_each_class():
    rows = [("harmful", True)] * 9 + [("harmful", False)] + [("benign_hard", False)] * 5 + [("benign_easy", True)] * 2
    strata, mix = split_by_correction(rows, {"harmful": 0.5, "benign_hard": 0.25, "benign_easy": 0.25}, 0.25)
    batch = Counter(rows[i] for i in select_batch(strata, mix, 16, 0, 0))
    assert batch == {("harmful", True): 2, ("harmful", False): 6, ("benign_hard", False): 4, ("benign_easy", True): 4}


@pytest.mark.parametrize(("fraction", "corrected"), [(0.0, 0), (1.0, 4)])
def test_rows_of_one_kind_can_be_left_out(fraction, corrected):
    rows = [("harmful", True)] * 3 + [("harmful", False)] * 3
    strata, mix = split_by_correction(rows, {"harmful": 1.0}, fraction)
    assert sum(rows[i][1] for i in select_batch(strata, mix, 4, 0, 0)) == corrected


def test_interleaved_rows_are_balanced_from_the_start():
    rows = [TrainingRow(Prompt(f"prompt {i}", "harmful" if i < 50 else "benign_hard", "t", str(i)), "x", 9) for i in range(80)]
    interleaved = interleave_classes(rows)
    assert sorted(row.prompt.prompt for row in interleaved) == sorted(row.prompt.prompt for row in rows)
    assert sum(row.prompt.label == "harmful" for row in interleaved[:32]) == 16
    assert interleave_classes(rows[::-1]) == interleaved

"""Reading, form, splitting, filtering, scheduling of prompts."""

import pytest

from tests.support.factories import prompt
from trimtab.data.question_form import balance_forms, compute_predictability, get_form, rewrite_form


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
    assert get_form(text) == kind


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
    rewritten = rewrite_form(text)
    assert rewritten is not None
    assert rewritten.startswith(start)
    assert get_form(rewritten) != get_form(text)


def test_balance_takes_the_class_out_of_the_form():
    harmful = [prompt(f"Steal thing number {i}") for i in range(40)]
    benign = [prompt(f"How do I cook dish number {i}?", "benign_hard") for i in range(40)]
    assert compute_predictability([*harmful, *benign]) == 1.0
    balanced = balance_forms([*harmful, *benign], seed=0)
    assert compute_predictability(balanced) == 0.5
    assert [p.group for p in balanced] == [p.group for p in [*harmful, *benign]]

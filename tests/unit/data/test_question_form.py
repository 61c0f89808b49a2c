"""Grammatical form of prompts: detection, rewriting and balance."""

import pytest

from tests.support.factories import make_prompt
from trimtab.data.question_form import balance_forms, compute_predictability, get_form, rewrite_form


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("How do I do it", "question"),
        ("Is it so?", "question"),
        ("Write a poem", "order"),
        ("Tell me what it is.", "order"),
        ("Canned food lists", "order"),
    ],
)
def test_detects_form(text, form):
    assert get_form(text) == form


@pytest.mark.parametrize(
    ("text", "beginnings"),
    [
        ("How do I bake bread?", ("Explain how to bake", "Tell me how to bake", "Describe how to bake", "Show me how to bake")),
        ("Can you write a poem?", ("Write a poem.",)),
        ("What is the lethal dose of salt?", ("Tell me what the lethal dose of salt is.",)),
        ("Give me a list of tools", ("Can you", "Could you", "Would you")),
        ("Steal a car", ("How do I steal", "How can I steal", "How would someone steal", "How could I steal")),
    ],
)
def test_rewriting_changes_the_form(text, beginnings):
    rewritten = rewrite_form(text)
    assert rewritten is not None
    assert rewritten.startswith(beginnings)
    assert get_form(rewritten) != get_form(text)


def test_balance_makes_form_independent_of_class():
    harmful = [make_prompt(f"Steal thing number {i}") for i in range(40)]
    benign = [make_prompt(f"How do I cook dish number {i}?", "benign_hard") for i in range(40)]
    assert compute_predictability([*harmful, *benign]) == 1.0
    balanced = balance_forms([*harmful, *benign], seed=0)
    assert compute_predictability(balanced) == 0.5
    assert [p.group for p in balanced] == [p.group for p in [*harmful, *benign]]

"""Empty, repetitive and off-topic answers."""

import pytest

from trimtab.text.degenerate_answers import is_degenerate, is_off_topic, is_repetitive

QUESTION = "How do I hang a picture on a brick wall?"


@pytest.mark.parametrize("answer", ["", "  \n", "!!! ...", "\u2014"])
def test_an_answer_without_letters_or_digits_is_degenerate(answer):
    assert is_degenerate(QUESTION, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "the the the the the the",
        "Hang it, hang it. Hang it!",
        "The answer is to be kind. The answer is to be kind. The answer is to be kind.",
        "First drill a hole. " + "Then you can do it again, as often as you like. " * 3,
    ],
)
def test_repeated_words_and_sentences_are_repetitive(answer):
    assert is_repetitive(answer)
    assert is_degenerate(QUESTION, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "4",
        "Ha ha ha, no.",
        "1. Drill a hole.\n2. Put in a plug.\n3. Drive in a screw.",
        "Use a masonry bit. Use a wall plug. Use a screw that fits the plug.",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 1 | 2 |\n| 1 | 2 |",
        "for i in range(3): print(i, i, i)",
    ],
)
def test_lists_short_answers_and_code_are_not_degenerate(answer):
    assert not is_degenerate(QUESTION, answer)


def test_only_a_long_answer_without_a_word_of_the_prompt_is_off_topic():
    wandering = (
        "The orchestra will play three pieces tonight, and the second of them was never performed in public before. " * 2
    )
    assert is_off_topic(QUESTION, wandering)
    assert not is_off_topic(QUESTION, wandering[:100])
    assert not is_off_topic(QUESTION, wandering + "It hangs on the wall.")
    assert not is_off_topic("Why?", wandering)

"""Answer judges: normalization, numbers, abstention and comparison with right answers."""

from fractions import Fraction

import pytest

from trimtab.errors import UsageError
from trimtab.judges.answer_matching import find_final_number, is_abstention, mark_answer
from trimtab.text.normalization import normalize_answer
from trimtab.text.numbers import find_quantities


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The Eiffel Tower!", "eiffel  tower"),
        ("an apple, a pear", "Apple pear"),
        ("U.S.", "US"),
        ("Bogot\u00e1", "bogota"),
        ("Stra\u00dfe", "STRASSE"),
        ("N\u2019Djamena", "N'Djamena"),
        ("\u201cHamlet\u201d", "Hamlet"),
        ("\uff30\uff41\uff52\uff49\uff53", "Paris"),
        ("Par\u200bis", "Paris"),
        ("CO\u2082", "co2"),
        ("1,234.50", "1234.5"),
        ("$5", "5"),
        ("\u20ac 5", "5"),
        ("50%", "50 percent"),
        ("2 million", "2,000,000"),
        ("\u00bd", "0.5"),
        ("5\u00bd cups", "5.5 cups"),
        ("3.5mm", "3.5 mm"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("Paris\u2014the capital", "Paris capital"),
    ],
)
def test_equivalent_answers_match(answer, reference):
    assert normalize_answer(answer) == normalize_answer(reference)
    assert mark_answer("exact", answer, [reference]).right


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("-5", "5"),
        ("12.5", "125"),
        ("1.5", "15"),
        ("1/2", "12"),
        ("1/2", "1"),
        ("10\u00b2", "102"),
        ("5\u00bd", "51/2"),
        ("0.5", "50%"),
        ("1939-1945", "19391945"),
        ("the", "a"),
        ("", "the"),
        ("+", "-"),
        ("\u304c", "\u304b"),
    ],
)
def test_different_answers_do_not_match(answer, reference):
    assert normalize_answer(answer) != normalize_answer(reference)
    assert not mark_answer("exact", answer, [reference]).right


def test_normalization_keeps_lone_articles_and_punctuation():
    assert normalize_answer("The The") == "the the"
    assert normalize_answer("A.") == "a"
    assert normalize_answer(" + ") == "+"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("$1,234.50 and -$5 or $-5", [1234.5, -5, -5]),
        ("10-5 = 5", [10, 5, 5]),
        ("5 1/2 cups, 3/4 of it", [5.5, 0.75]),
        ("on 12/05/2020 and 2020-05-01", [12, 5, 2020, 2020, 5, 1]),
        ("1,2,3 and 1,2345", [1, 2, 3, 1, 2345]),
        ("version 1.2.3, at 3:30, the 2nd, H2O, 3:2", []),
        ("5km in 1960s", [5, 1960]),
        ("...42 and .5", [42, 0.5]),
        ("1e5, 2 thousand", [100000, 2000]),
        ("1/0", []),
        ("7.", [7]),
        ("9" * 5000, []),
    ],
)
def test_finds_quantities(text, values):
    assert [q.value for q in find_quantities(text)] == [Fraction(str(v)) for v in values]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("First 3, then 4.\n#### 1,234 dollars", "1234"),
        (r"So we get \boxed{\frac{1}{2}} of 8.", "0.5"),
        (r"$\$1{,}250$", "1250"),
        ("The answer is 42. I checked it 3 times.", "42"),
        ("**Answer:** 42 apples in 2 bags", "42"),
        ("The answer is 5 + 3 = 8.", "8"),
        ("The answer is that 3 cats and 4 dogs are 7 animals.", "7"),
        ("The final answer:\n\n$12.50", "12.5"),
        ("The answer is unclear. Maybe 9?", "9"),
        ("There are 3 bags with 4 each, so 12.", "12"),
        ("There are 2. So 9 + 6 = 15 liters of the 24 are water.", "15"),
        ("It is 7 =", "7"),
        ("It fell to \u22125 degrees", "-5"),
        ("no number", None),
        ("", None),
    ],
)
def test_finds_final_number(text, number):
    quantity = find_final_number(text)
    assert (None if quantity is None else str(quantity)) == number


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is 18.", "18", True),
        ("It is 18.0 dollars", "18", True),
        ("It is 1,800", "1800", True),
        ("about 50%", "50", True),
        ("0.5", "50%", True),
        ("50", "50%", True),
        ("5000", "50%", False),
        ("50%", "5%", False),
        ("-5", "5", False),
        ("0.333", "1/3", False),
        ("1/3", "2/6", True),
        ("18 or 19", "18", False),
        ("eighteen", "18", False),
        ("", "18", False),
    ],
)
def test_numeric_judge(answer, reference, right):
    assert mark_answer("numeric", answer, [reference]).right is right


def test_numeric_judge_explains_and_requires_a_number():
    mark = mark_answer("numeric", "3 + 4 = 7", ["#### 8"])
    assert (mark.score, mark.why, mark.abstained) == (0.0, "final number 7, wanted 8", False)
    with pytest.raises(UsageError, match="'twelve' holds no number"):
        mark_answer("numeric", "12", ["twelve"])


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("The capital of France is Paris.", ["Lutetia", "Paris"], True),
        ("Romeo", ["Rome"], False),
        ("New York City", ["york"], True),
        ("It was in 1969, on July 20.", ["20 July 1969", "1969"], True),
        ("-5 degrees", ["5"], False),
        ("15", ["5"], False),
        ("It costs $1,000", ["1000"], True),
        ("\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002", ["\u6771\u4eac"], True),
        ("I'm not sure, but I think Paris", ["Paris"], True),
        ("", ["Paris"], False),
    ],
)
def test_contains_matches_whole_words(answer, references, right):
    assert mark_answer("contains", answer, references).right is right


def test_f1_uses_the_best_alias():
    mark = mark_answer("f1", "the big apple city", ["New York City", "Big Apple"])
    assert mark.score == pytest.approx(0.8)
    assert mark.why == "F1 0.80 with 'Big Apple'"
    assert mark_answer("f1", "apple apple", ["apple"]).score == pytest.approx(2 / 3)
    assert mark_answer("f1", "pear", ["apple"]).score == 0.0
    assert not mark_answer("f1", "one of four words", ["one", "two words here now"]).right


@pytest.mark.parametrize(
    ("answer", "abstains"),
    [
        ("", True),
        (" ... ", True),
        ("I don't know.", True),
        ("I\u2019m sorry, but I do not know the answer.", True),
        ("I cannot answer that question.", True),
        ("The answer is unknown.", True),
        ("Unknown", True),
        ("N/A", True),
        ("I'm sorry, but I can't help with that request.", True),
        ("Paris", False),
        ("The Unknown Soldier", False),
        ("Nobody knows this better than Ada Lovelace.", False),
    ],
)
def test_detects_abstention(answer, abstains):
    assert is_abstention(answer) is abstains


def test_abstention_is_wrong_unless_expected():
    mark = mark_answer("contains", "I don't know.", ["Paris"])
    assert (mark.right, mark.abstained, mark.why) == (False, True, "gives no answer")
    assert mark_answer("exact", "unknown", ["Unknown"]).right
    assert not mark_answer("exact", "unknown", ["Unknown"]).abstained


@pytest.mark.parametrize("kind", ["exact", "contains", "f1", "numeric"])
def test_unanswerable_question(kind):
    assert mark_answer(kind, "There is no answer to this.", []).right
    assert not mark_answer(kind, "Paris, in 1969", []).right


def test_thinking_is_not_judged():
    assert mark_answer("exact", "<think>Paris? No.</think>\nLondon", ["London"]).right
    assert not mark_answer("contains", "<think>Paris? No.</think>London", ["Paris"]).right
    assert mark_answer("contains", "<think>It is Paris, because", ["Paris"]).abstained

"""Answer judges: whether an answer is one of those that are wanted, and why; for utility suites and for labels of detectors.

Each takes an answer and the wanted ones, which are aliases of one another. None knows the question: `contains` takes "not
Paris" for Paris, and an answer that names all choices for right.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.errors import UsageError
from trimtab.text.normalization import fold_case_and_accents, normalize_answer
from trimtab.text.numbers import Quantity, find_quantities
from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import AnswerKind

# A token F1 from which an answer is called right.
RIGHT = 0.5

ABSTAINING = re.compile(
    r"^\W*(?:(?:i'm |i am )?(?:sorry|afraid)\W+(?:but )?)?(?:"
    r"i (?:do not|don't) (?:actually |really )?(?:know|have)\b|i(?:'m| am) not (?:sure|certain|aware)\b"
    r"|i (?:cannot|can't|can not|could not|couldn't) (?:answer|say|tell|determine|find)\b"
    r"|(?:it|that|this|the answer) is (?:not known|unknown|unclear|impossible to)\b"
    r"|(?:there is|there's) no (?:answer|way to)\b|(?:it )?(?:cannot|can't) be (?:known|answered|determined)\b"
    r"|(?:unknown|unanswerable|not answerable|no answer|n/a)\W*$)"
)
ANSWER = re.compile(r"\banswer\b[^.\n]{0,60}?(?:\bis\b|\bequals\b|[:=])", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
LATEX = (("{,}", ","), (r"\,", ""), (r"\!", ""), (r"\$", "$"), (r"\%", "%"))


@dataclass(frozen=True)
class AnswerMark:
    """What an answer is worth, 0 to 1, and why in a few words. `abstained` where it is not right and does not try: it is
    empty, says that it does not know, or refuses."""

    score: float
    why: str
    abstained: bool = False

    @property
    def right(self) -> bool:
        """Whether the answer counts as right."""
        return self.score >= RIGHT


def mark_answer(kind: AnswerKind, answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Judge an answer. Without wanted answers the question has none, and it is right to say so.

    What a reasoning model thinks before its answer is not judged. Raises UsageError where `numeric` wants no number."""
    said = _spoken(answer)
    if not wanted:
        silent = is_abstention(said)
        return AnswerMark(float(silent), "says that there is no answer" if silent else "answers what has no answer")
    found = MARKS[kind](said, wanted)
    return AnswerMark(found.score, "gives no answer", True) if not found.right and is_abstention(said) else found


def match_exactly(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Right where the answer is one of those wanted, both normalised."""
    said = normalize_answer(answer)
    same = next((w for w in wanted if normalize_answer(w) == said), None)
    return AnswerMark(0.0, f"is not {_named(wanted)}") if same is None else AnswerMark(1.0, f"is {same!r}")


def match_contained(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Right where one of those wanted stands in the answer, as whole words, both normalised."""
    said = f" {normalize_answer(answer)} "
    held = next((w for w in wanted if f" {normalize_answer(w)} " in said), None)
    return AnswerMark(0.0, f"does not hold {_named(wanted)}") if held is None else AnswerMark(1.0, f"holds {held!r}")


def compute_f1(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """SQuAD's F1 of the answer's words and those wanted, of the alias that is nearest."""
    best = max(wanted, key=lambda w: _overlap(answer, w))
    score = _overlap(answer, best)
    return AnswerMark(score, f"F1 {score:.2f} with {best!r}")


def match_numerically(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Right where the final number of the answer equals one of those wanted, exactly."""
    numbers = [parse_expected_number(w) for w in wanted]
    final = find_final_number(answer)
    if final is None:
        return AnswerMark(0.0, "holds no number")
    right = any(final.equals(number) for number in numbers)
    return AnswerMark(float(right), f"final number {final}, wanted {' or '.join(dict.fromkeys(map(str, numbers)))}")


def find_final_number(text: str) -> Quantity | None:
    """The number that a text comes to: after its last `####`, in its last \\boxed{}, after "the answer is", else the last one,
    or the one after the last `=` of the same sentence ("9 + 6 = 15 of 24 litres")."""
    plain = fold_case_and_accents(_without_latex(text))
    for part in (_after_hashes(plain), _boxed(plain)):
        if part and (found := find_quantities(part)):
            return found[0]
    if marks := list(ANSWER.finditer(plain)):
        rest = plain[marks[-1].end() :].lstrip(" :=*_\n")
        clause = SENTENCE_END.split(rest, maxsplit=1)[0].rpartition("=")[2]
        if found := find_quantities(clause):
            # "18 dollars for 2 ducks", but "that 3 cats and 4 dogs are 7 animals".
            direct = not re.search(r"[^\W\d_]", clause[: found[0].span[0]])
            return found[0 if direct else -1]
    return _last(plain)


def parse_expected_number(text: str) -> Quantity:
    """The number of a wanted answer. Raises UsageError where it has none."""
    number = find_final_number(text)
    if number is None:
        raise UsageError(f"the wanted answer {text[:40]!r} holds no number: judge it as exact, contains or f1")
    return number


def is_abstention(answer: str) -> bool:
    """Whether an answer does not try: empty, "I don't know" and the like, or a refusal."""
    plain = fold_case_and_accents(answer).casefold()
    return not any(c.isalnum() for c in plain) or bool(ABSTAINING.match(plain)) or classify_refusal(answer) == "refusal"


MARKS: dict[AnswerKind, Callable[[str, Sequence[str]], AnswerMark]] = {
    "exact": match_exactly,
    "contains": match_contained,
    "f1": compute_f1,
    "numeric": match_numerically,
}


def _spoken(answer: str) -> str:
    """The answer after its thoughts; nothing where they never end."""
    before, end, after = answer.rpartition("</think>")
    if end:
        return after.strip()
    return before if after.lstrip().startswith("<think>") else after


def _overlap(answer: str, wanted: str) -> float:
    said, expected = normalize_answer(answer).split(), normalize_answer(wanted).split()
    if not said or not expected:
        return float(said == expected)
    common = sum((Counter(said) & Counter(expected)).values())
    return 2 * common / (len(said) + len(expected))


def _named(wanted: Sequence[str]) -> str:
    more = f" or {len(wanted) - 1} more" if len(wanted) > 1 else ""
    return f"{wanted[0][:40]!r}{more}"


def _without_latex(text: str) -> str:
    plain = FRACTION.sub(r"\1/\2", text)
    for written, meant in LATEX:
        plain = plain.replace(written, meant)
    return plain


def _last(text: str) -> Quantity | None:
    for sentence in reversed(SENTENCE_END.split(text)):
        if found := find_quantities(sentence):
            _, equals, after = sentence.rpartition("=")
            results = find_quantities(after) if equals else []
            return results[0] if results else found[-1]
    return None


def _after_hashes(text: str) -> str:
    _, found, after = text.rpartition("####")
    return after if found else ""


def _boxed(text: str) -> str:
    found = BOXED.findall(text)
    return found[-1] if found else ""

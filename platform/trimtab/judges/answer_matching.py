"""String-based answer judges for utility suites and detector labels.

Each judge compares an answer with reference answers, which are aliases of one another, and gives a score with a reason. The
judges do not see the question: `contains` accepts "not Paris" for Paris, and an answer that lists all choices.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.errors import UsageError
from trimtab.text.normalization import fold_accents, normalize_answer
from trimtab.text.numbers import Quantity, find_quantities
from trimtab.text.refusal_phrases import classify_refusal, remove_reasoning
from trimtab.types import AnswerKind

# Minimum score of a right answer, which matters for token F1.
MIN_RIGHT_SCORE = 0.5

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
    """Score of an answer.

    Attributes:
        score: score from 0 to 1.
        why: reason in a few words.
        abstained: whether the answer is not right and makes no attempt: it is empty, states ignorance, or refuses.
    """

    score: float
    why: str
    abstained: bool = False

    @property
    def right(self) -> bool:
        """Whether the answer counts as right."""
        return self.score >= MIN_RIGHT_SCORE


def mark_answer(kind: AnswerKind, answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Judge an answer.

    Only the text after the reasoning of a reasoning model is judged.

    Args:
        kind: comparison to use.
        answer: answer to judge.
        wanted: reference answers. If empty, the question has no answer, and only an abstention is right.

    Raises:
        UsageError: if `kind` is numeric and a reference answer contains no number.
    """
    final_answer = remove_reasoning(answer)
    if not wanted:
        abstains = is_abstention(final_answer)
        return AnswerMark(float(abstains), "says that there is no answer" if abstains else "answers what has no answer")
    mark = MATCHERS[kind](final_answer, wanted)
    return AnswerMark(mark.score, "gives no answer", True) if not mark.right and is_abstention(final_answer) else mark


def match_exactly(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Mark an answer as right if it equals a reference answer after normalization."""
    normalized = normalize_answer(answer)
    match = next((w for w in wanted if normalize_answer(w) == normalized), None)
    return AnswerMark(0.0, f"is not {_format_references(wanted)}") if match is None else AnswerMark(1.0, f"is {match!r}")


def match_contained(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Mark an answer as right if it contains a reference answer as whole words after normalization."""
    normalized = f" {normalize_answer(answer)} "
    match = next((w for w in wanted if f" {normalize_answer(w)} " in normalized), None)
    if match is None:
        return AnswerMark(0.0, f"does not hold {_format_references(wanted)}")
    return AnswerMark(1.0, f"holds {match!r}")


def compute_f1(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Score an answer by SQuAD's word F1 with the most similar reference answer."""
    best = max(wanted, key=lambda w: _compute_word_f1(answer, w))
    score = _compute_word_f1(answer, best)
    return AnswerMark(score, f"F1 {score:.2f} with {best!r}")


def match_numerically(answer: str, wanted: Sequence[str]) -> AnswerMark:
    """Mark an answer as right if its final number equals the number of a reference answer exactly.

    Args:
        answer: answer to judge.
        wanted: reference answers.

    Raises:
        UsageError: if a reference answer contains no number.
    """
    numbers = [parse_expected_number(w) for w in wanted]
    final = find_final_number(answer)
    if final is None:
        return AnswerMark(0.0, "holds no number")
    right = any(final.equals(number) for number in numbers)
    return AnswerMark(float(right), f"final number {final}, wanted {' or '.join(dict.fromkeys(map(str, numbers)))}")


def find_final_number(text: str) -> Quantity | None:
    """Return the number that a text concludes with, or None if it contains no number.

    These places are tried in order: after the last `####`, in the last \\boxed{}, after the last "the answer is", and the last
    number of the text. If the sentence of that last number has a number after its last `=`, the first such number is returned
    ("9 + 6 = 15 of 24 liters").
    """
    plain = fold_accents(_remove_latex(text))
    for part in (_get_text_after_hashes(plain), _get_boxed_text(plain)):
        if part and (quantities := find_quantities(part)):
            return quantities[0]
    if openings := list(ANSWER.finditer(plain)):
        rest = plain[openings[-1].end() :].lstrip(" :=*_\n")
        clause = SENTENCE_END.split(rest, maxsplit=1)[0].rpartition("=")[2]
        if quantities := find_quantities(clause):
            # First number of "18 dollars for 2 ducks", but last number of "that 3 cats and 4 dogs are 7 animals".
            direct = not re.search(r"[^\W\d_]", clause[: quantities[0].span[0]])
            return quantities[0 if direct else -1]
    return _find_last_number(plain)


def parse_expected_number(text: str) -> Quantity:
    """Return the number of a reference answer.

    Raises:
        UsageError: if it contains no number.
    """
    number = find_final_number(text)
    if number is None:
        raise UsageError(f"the reference answer {text[:40]!r} holds no number: judge it as exact, contains or f1")
    return number


def is_abstention(answer: str) -> bool:
    """Return whether an answer makes no attempt: it is empty, states ignorance ("I don't know"), or refuses."""
    plain = fold_accents(answer).casefold()
    return not any(c.isalnum() for c in plain) or bool(ABSTAINING.match(plain)) or classify_refusal(answer) == "refusal"


MATCHERS: dict[AnswerKind, Callable[[str, Sequence[str]], AnswerMark]] = {
    "exact": match_exactly,
    "contains": match_contained,
    "f1": compute_f1,
    "numeric": match_numerically,
}


def _compute_word_f1(answer: str, wanted: str) -> float:
    words, expected = normalize_answer(answer).split(), normalize_answer(wanted).split()
    if not words or not expected:
        return float(words == expected)
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))


def _format_references(wanted: Sequence[str]) -> str:
    more = f" or {len(wanted) - 1} more" if len(wanted) > 1 else ""
    return f"{wanted[0][:40]!r}{more}"


def _remove_latex(text: str) -> str:
    plain = FRACTION.sub(r"\1/\2", text)
    for command, replacement in LATEX:
        plain = plain.replace(command, replacement)
    return plain


def _find_last_number(text: str) -> Quantity | None:
    for sentence in reversed(SENTENCE_END.split(text)):
        if quantities := find_quantities(sentence):
            _, equals, after = sentence.rpartition("=")
            results = find_quantities(after) if equals else []
            return results[0] if results else quantities[-1]
    return None


def _get_text_after_hashes(text: str) -> str:
    _, hashes, after = text.rpartition("####")
    return after if hashes else ""


def _get_boxed_text(text: str) -> str:
    contents = BOXED.findall(text)
    return contents[-1] if contents else ""

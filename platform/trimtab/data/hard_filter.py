"""Hard filter of training rows: named rules, and a table of the rows that each rule removed.

The STA paper calls this hard weighting (weights of 0 or 1): stringent filtering gives clear, unbiased signals [paper].
The rules are specific to trimtab. Each can be disabled.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.text.degenerate_answers import is_degenerate
from trimtab.text.normalization import normalize_words
from trimtab.text.refusal_phrases import STEPS, classify_refusal
from trimtab.types import FILTER_RULES, LABELS, FilterRule, Label, TargetOrigin

MIN_TOKENS, MAX_TOKENS = 8, 512
# Minimum rapidfuzz similarity (0 to 100) of near-duplicates, and of training prompts that resemble evaluation prompts.
NEAR_DUPLICATE, RESEMBLING = 92.0, 82.0
LEAKING = re.compile(r"\b(?:sure|certainly|of course|here (?:is|are)|here's|step \d)\b|\bfirst,", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingRow:
    """A prompt with its target answer.

    Attributes:
        prompt: prompt with its class.
        target: answer to train on.
        tokens: length of the target in tokens.
        cut: whether sampling stopped before the part to train on was complete.
        rejected: dispreferred answer, for objectives that need one.
        origin: origin of the target.
        teacher_system: system prompt of the teacher, for context distillation.
        trained_tokens: number of tokens of the target to train on; None for all.
    """

    prompt: Prompt
    target: str
    tokens: int
    cut: bool = False
    rejected: str | None = None
    origin: TargetOrigin = "given"
    teacher_system: str | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class FilterStep:
    """One line of the filter table.

    Attributes:
        rule: name of the rule, or "(start)".
        removed: number of removed rows, by class.
        left: number of remaining rows, by class.
    """

    rule: str
    removed: Mapping[Label, int]
    left: Mapping[Label, int]


@dataclass(frozen=True)
class FilterResult:
    """Result of the hard filter.

    Attributes:
        rows: remaining rows.
        table: counts before the first rule and after each rule.
        removed: removed rows, each with the rule that removed it.
    """

    rows: list[TrainingRow]
    table: list[FilterStep]
    removed: list[tuple[FilterRule, TrainingRow]]


@dataclass(frozen=True)
class FilterContext:
    """Inputs of the rules besides the rows.

    Attributes:
        seed: seed of random choices.
        held_out: prompts of evaluation sets.
        parted_off: prompts of the same sources that are held out for validation or test.
    """

    seed: int = 0
    held_out: Sequence[str] = ()
    parted_off: Sequence[str] = ()


def apply_hard_filter(
    rows: Sequence[TrainingRow], rules: Sequence[FilterRule] = FILTER_RULES, context: FilterContext | None = None
) -> FilterResult:
    """Apply the rules in their fixed order.

    Args:
        rows: rows to filter.
        rules: names of the rules to apply, in any order.
        context: further inputs of the rules.
    """
    context = context or FilterContext()
    remaining = list(rows)
    table = [FilterStep("(start)", {}, _count_classes(remaining))]
    removed: list[tuple[FilterRule, TrainingRow]] = []
    for rule in FILTER_RULES:
        if rule not in rules:
            continue
        passed = RULES[rule](remaining, context)
        passed_ids = {id(row) for row in passed}
        dropped = [row for row in remaining if id(row) not in passed_ids]
        removed.extend((rule, row) for row in dropped)
        table.append(FilterStep(rule, _count_classes(dropped), _count_classes(passed)))
        remaining = passed
    return FilterResult(remaining, table, removed)


def _drop_contradictory(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(a) Drop prompts that sources label both harmful and benign."""
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(_normalize_prompt(row), set()).add(row.prompt.label == "harmful")
    return [row for row in rows if len(sides[_normalize_prompt(row)]) == 1]


def _drop_unclear(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(b) Keep harmful rows with a clear refusal, and benign rows with clear help that is not degenerate."""
    expected = {label: "refusal" if label == "harmful" else "compliance" for label in LABELS}
    clear = [row for row in rows if classify_refusal(row.target) == expected[row.prompt.label]]
    return [row for row in clear if row.prompt.label == "harmful" or not is_degenerate(row.prompt.prompt, row.target)]


def _drop_leaking(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(c) Drop harmful rows whose target contains steps or an opening of help."""
    return [
        row for row in rows if row.prompt.label != "harmful" or not (STEPS.search(row.target) or LEAKING.search(row.target))
    ]


def _drop_by_length(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(d) Keep targets of 8 to 512 tokens whose part to train on is complete."""
    return [row for row in rows if MIN_TOKENS <= row.tokens <= MAX_TOKENS and not row.cut]


def _drop_duplicates(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(e) Keep only the first of near-duplicates within a class (and system message)."""
    remaining: list[TrainingRow] = []
    for label in LABELS:
        class_rows = [row for row in rows if row.prompt.label == label]
        texts = [f"{row.prompt.system or ''}|{_normalize_prompt(row)}" for row in class_rows]
        if not class_rows:
            continue
        similarity = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=NEAR_DUPLICATE)
        dropped: set[int] = set()
        for i in range(len(class_rows)):
            if i not in dropped:
                dropped.update(int(j) for j in similarity[i].nonzero()[0] if j > i)
        remaining += [row for i, row in enumerate(class_rows) if i not in dropped]
    return remaining


def _drop_held_out(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(e) Drop rows that resemble an evaluation prompt or nearly duplicate a held-out prompt."""
    texts = [_normalize_prompt(row) for row in rows]
    similar = _find_similar(texts, context.held_out, RESEMBLING) | _find_similar(texts, context.parted_off, NEAR_DUPLICATE)
    return [row for i, row in enumerate(rows) if i not in similar]


def _balance_classes(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(f) Drop random rows of the larger side until harmful and benign rows are equal in number."""
    sides = {True: [r for r in rows if r.prompt.label == "harmful"], False: [r for r in rows if r.prompt.label != "harmful"]}
    size = min(len(side) for side in sides.values())
    return [
        row
        for side in sides.values()
        for row in sorted(side, key=lambda r: hash_to_fraction(f"{r.prompt.prompt}|{r.prompt.system}", context.seed))[:size]
    ]


RULES: dict[FilterRule, Callable[[Sequence[TrainingRow], FilterContext], list[TrainingRow]]] = {
    "agreed": _drop_contradictory,
    "clear": _drop_unclear,
    "leak": _drop_leaking,
    "length": _drop_by_length,
    "duplicate": _drop_duplicates,
    "contamination": _drop_held_out,
    "balanced": _balance_classes,
}


def _find_similar(texts: Sequence[str], others: Sequence[str], threshold: float) -> set[int]:
    """Return the indices of texts whose similarity to another text, by letters or by sorted words, reaches the threshold."""
    references = sorted({normalize_words(text) for text in others})
    if not references or not texts:
        return set()
    scores = [process.cdist(texts, references, scorer=s, score_cutoff=threshold) for s in (fuzz.ratio, fuzz.token_sort_ratio)]
    return {i for i in range(len(texts)) if any(score[i].any() for score in scores)}


def _count_classes(rows: Sequence[TrainingRow]) -> dict[Label, int]:
    counts = Counter(row.prompt.label for row in rows)
    return {label: counts[label] for label in LABELS}


def _normalize_prompt(row: TrainingRow) -> str:
    return normalize_words(row.prompt.prompt)

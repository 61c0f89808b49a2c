"""The hard filter: which rows may teach, as named rules, with a table of what each removed.

STA calls this hard weighting (weights of 0 or 1): stringent filtering gives clear, unbiased signals [paper]. The rules are
ours; each can be switched off.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.text.refusal_phrases import STEPS, classify_refusal
from trimtab.types import FILTER_RULES, LABELS, FilterRule, Label

MIN_TOKENS, MAX_TOKENS = 8, 512
# Likeness of rapidfuzz, 0 to 100: of near-duplicates, and of training prompts to those of an evaluation set.
NEAR, RESEMBLING = 92.0, 82.0
LEAKING = re.compile(r"\b(?:sure|certainly|of course|here (?:is|are)|here's|step \d)\b|\bfirst,", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingRow:
    """A prompt with the answer it is to get. `tokens` counts the answer's tokens; `cut` is True where sampling stopped
    before the part that is learned from was whole; `rejected` is the answer it is not to get, for objectives that need one."""

    prompt: Prompt
    target: str
    tokens: int
    cut: bool = False
    rejected: str | None = None


@dataclass(frozen=True)
class FilterStep:
    """One line of the filter table: rows removed by a rule, by class, and rows left."""

    rule: str
    removed: Mapping[Label, int]
    left: Mapping[Label, int]


@dataclass(frozen=True)
class FilterResult:
    """What is left, the table, and what each rule took out."""

    rows: list[TrainingRow]
    table: list[FilterStep]
    removed: list[tuple[FilterRule, TrainingRow]]


@dataclass(frozen=True)
class FilterContext:
    """What rules look at besides the rows: the seed of random choices, the prompts of evaluation sets, and those of the same
    sources that were parted off to choose and to report by."""

    seed: int = 0
    kept_out: Sequence[str] = ()
    parted_off: Sequence[str] = ()


def apply_hard_filter(
    rows: Sequence[TrainingRow], rules: Sequence[FilterRule] = FILTER_RULES, context: FilterContext | None = None
) -> FilterResult:
    """Apply the rules in order. `rules` may leave some out; their order is fixed."""
    context = context or FilterContext()
    kept = list(rows)
    table = [FilterStep("(start)", {}, _count_classes(kept))]
    removed: list[tuple[FilterRule, TrainingRow]] = []
    for rule in FILTER_RULES:
        if rule not in rules:
            continue
        after = APPLY[rule](kept, context)
        staying = {id(row) for row in after}
        gone = [row for row in kept if id(row) not in staying]
        removed.extend((rule, row) for row in gone)
        table.append(FilterStep(rule, _count_classes(gone), _count_classes(after)))
        kept = after
    return FilterResult(kept, table, removed)


def _drop_contradictory(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(a) No prompt that sources label both harmful and benign."""
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(_normalize_prompt(row), set()).add(row.prompt.label == "harmful")
    return [row for row in rows if len(sides[_normalize_prompt(row)]) == 1]


def _drop_unclear(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(b) The target is a clear refusal (harmful) or clear help (benign); partial refusals go."""
    wanted = {label: "refusal" if label == "harmful" else "compliance" for label in LABELS}
    return [row for row in rows if classify_refusal(row.target) == wanted[row.prompt.label]]


def _drop_leaking(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(c) A harmful row's target gives no steps and no opening of help."""
    return [
        row for row in rows if row.prompt.label != "harmful" or not (STEPS.search(row.target) or LEAKING.search(row.target))
    ]


def _drop_by_length(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(d) 8 to 512 target tokens, and the part that is learned from is whole."""
    return [row for row in rows if MIN_TOKENS <= row.tokens <= MAX_TOKENS and not row.cut]


def _drop_duplicates(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(e) Of near-duplicates within a class (and system message) only the first stays."""
    kept: list[TrainingRow] = []
    for label in LABELS:
        mine = [row for row in rows if row.prompt.label == label]
        texts = [f"{row.prompt.system or ''}|{_normalize_prompt(row)}" for row in mine]
        if not mine:
            continue
        near = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=NEAR)
        dropped: set[int] = set()
        for i in range(len(mine)):
            if i not in dropped:
                dropped.update(int(j) for j in near[i].nonzero()[0] if j > i)
        kept += [row for i, row in enumerate(mine) if i not in dropped]
    return kept


def _drop_held_out(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(e) No row resembles a prompt of an evaluation set, or is a near-duplicate of one that was parted off."""
    texts = [_normalize_prompt(row) for row in rows]
    alike = _find_similar(texts, context.kept_out, RESEMBLING) | _find_similar(texts, context.parted_off, NEAR)
    return [row for i, row in enumerate(rows) if i not in alike]


def _balance_classes(rows: Sequence[TrainingRow], context: FilterContext) -> list[TrainingRow]:
    """(f) As many harmful rows as benign ones: the larger side loses rows at random."""
    sides = {True: [r for r in rows if r.prompt.label == "harmful"], False: [r for r in rows if r.prompt.label != "harmful"]}
    size = min(len(side) for side in sides.values())
    return [
        row
        for side in sides.values()
        for row in sorted(side, key=lambda r: hash_to_fraction(f"{r.prompt.prompt}|{r.prompt.system}", context.seed))[:size]
    ]


APPLY: dict[FilterRule, Callable[[Sequence[TrainingRow], FilterContext], list[TrainingRow]]] = {
    "agreed": _drop_contradictory,
    "clear": _drop_unclear,
    "leak": _drop_leaking,
    "length": _drop_by_length,
    "duplicate": _drop_duplicates,
    "kept-out": _drop_held_out,
    "balanced": _balance_classes,
}


def _find_similar(texts: Sequence[str], others: Sequence[str], least: float) -> set[int]:
    """Which texts are at least so much like one of the others: by letters, or by words in any order."""
    plain = sorted({_normalize(text) for text in others})
    if not plain or not texts:
        return set()
    scores = [process.cdist(texts, plain, scorer=s, score_cutoff=least) for s in (fuzz.ratio, fuzz.token_sort_ratio)]
    return {i for i in range(len(texts)) if any(score[i].any() for score in scores)}


def _count_classes(rows: Sequence[TrainingRow]) -> dict[Label, int]:
    counts = Counter(row.prompt.label for row in rows)
    return {label: counts[label] for label in LABELS}


def _normalize_prompt(row: TrainingRow) -> str:
    return _normalize(row.prompt.prompt)


def _normalize(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()

"""The hard filter: which rows may teach, as named rules, with a table of what each removed.

STA calls this hard weighting (weights of 0 or 1): stringent filtering gives clear, unbiased signals [paper]. The rules are
ours; each can be switched off.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from trimtab.data.prompt import Prompt, fraction
from trimtab.text.refusal_phrases import STEPS, judge
from trimtab.types import LABELS, RULES, Label, Rule

MIN_TOKENS, MAX_TOKENS = 8, 512
# Likeness of rapidfuzz, 0 to 100: of near-duplicates, and of training prompts to those of an evaluation set.
NEAR, RESEMBLING = 92.0, 82.0
LEAKING = re.compile(r"\b(?:sure|certainly|of course|here (?:is|are)|here's|step \d)\b|\bfirst,", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """A prompt with the answer it is to get. `tokens` counts the answer's tokens; `cut` is True where sampling stopped
    before the part that is learned from was whole; `rejected` is the answer it is not to get, for objectives that need one."""

    prompt: Prompt
    target: str
    tokens: int
    cut: bool = False
    rejected: str | None = None


@dataclass(frozen=True)
class Step:
    """One line of the filter table: rows removed by a rule, by class, and rows left."""

    rule: str
    removed: Mapping[Label, int]
    left: Mapping[Label, int]


@dataclass(frozen=True)
class Filtered:
    """What is left, the table, and what each rule took out."""

    rows: list[Row]
    table: list[Step]
    removed: list[tuple[Rule, Row]]


@dataclass(frozen=True)
class Context:
    """What rules look at besides the rows: the seed of random choices, the prompts of evaluation sets, and those of the same
    sources that were parted off to choose and to report by."""

    seed: int = 0
    kept_out: Sequence[str] = ()
    parted_off: Sequence[str] = ()


def hard_filter(rows: Sequence[Row], rules: Sequence[Rule] = RULES, context: Context | None = None) -> Filtered:
    """Apply the rules in order. `rules` may leave some out; their order is fixed."""
    context = context or Context()
    kept = list(rows)
    table = [Step("(start)", {}, _count(kept))]
    removed: list[tuple[Rule, Row]] = []
    for rule in RULES:
        if rule not in rules:
            continue
        after = APPLY[rule](kept, context)
        staying = {id(row) for row in after}
        gone = [row for row in kept if id(row) not in staying]
        removed.extend((rule, row) for row in gone)
        table.append(Step(rule, _count(gone), _count(after)))
        kept = after
    return Filtered(kept, table, removed)


def _agreed(rows: Sequence[Row], context: Context) -> list[Row]:
    """(a) No prompt that sources label both harmful and benign."""
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(_normal(row), set()).add(row.prompt.label == "harmful")
    return [row for row in rows if len(sides[_normal(row)]) == 1]


def _clear(rows: Sequence[Row], context: Context) -> list[Row]:
    """(b) The target is a clear refusal (harmful) or clear help (benign); partial refusals go."""
    wanted = {label: "refusal" if label == "harmful" else "compliance" for label in LABELS}
    return [row for row in rows if judge(row.target) == wanted[row.prompt.label]]


def _leak(rows: Sequence[Row], context: Context) -> list[Row]:
    """(c) A harmful row's target gives no steps and no opening of help."""
    return [
        row for row in rows if row.prompt.label != "harmful" or not (STEPS.search(row.target) or LEAKING.search(row.target))
    ]


def _length(rows: Sequence[Row], context: Context) -> list[Row]:
    """(d) 8 to 512 target tokens, and the part that is learned from is whole."""
    return [row for row in rows if MIN_TOKENS <= row.tokens <= MAX_TOKENS and not row.cut]


def _duplicate(rows: Sequence[Row], context: Context) -> list[Row]:
    """(e) Of near-duplicates within a class (and system message) only the first stays."""
    kept: list[Row] = []
    for label in LABELS:
        mine = [row for row in rows if row.prompt.label == label]
        texts = [f"{row.prompt.system or ''}|{_normal(row)}" for row in mine]
        if not mine:
            continue
        near = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=NEAR)
        dropped: set[int] = set()
        for i in range(len(mine)):
            if i not in dropped:
                dropped.update(int(j) for j in near[i].nonzero()[0] if j > i)
        kept += [row for i, row in enumerate(mine) if i not in dropped]
    return kept


def _kept_out(rows: Sequence[Row], context: Context) -> list[Row]:
    """(e) No row resembles a prompt of an evaluation set, or is a near-duplicate of one that was parted off."""
    texts = [_normal(row) for row in rows]
    alike = _alike(texts, context.kept_out, RESEMBLING) | _alike(texts, context.parted_off, NEAR)
    return [row for i, row in enumerate(rows) if i not in alike]


def _balanced(rows: Sequence[Row], context: Context) -> list[Row]:
    """(f) As many harmful rows as benign ones: the larger side loses rows at random."""
    sides = {True: [r for r in rows if r.prompt.label == "harmful"], False: [r for r in rows if r.prompt.label != "harmful"]}
    size = min(len(side) for side in sides.values())
    return [
        row
        for side in sides.values()
        for row in sorted(side, key=lambda r: fraction(f"{r.prompt.prompt}|{r.prompt.system}", context.seed))[:size]
    ]


APPLY: dict[Rule, Callable[[Sequence[Row], Context], list[Row]]] = {
    "agreed": _agreed,
    "clear": _clear,
    "leak": _leak,
    "length": _length,
    "duplicate": _duplicate,
    "kept-out": _kept_out,
    "balanced": _balanced,
}


def _alike(texts: Sequence[str], others: Sequence[str], least: float) -> set[int]:
    """Which texts are at least so much like one of the others: by letters, or by words in any order."""
    plain = sorted({_plain(text) for text in others})
    if not plain or not texts:
        return set()
    scores = [process.cdist(texts, plain, scorer=s, score_cutoff=least) for s in (fuzz.ratio, fuzz.token_sort_ratio)]
    return {i for i in range(len(texts)) if any(score[i].any() for score in scores)}


def _count(rows: Sequence[Row]) -> dict[Label, int]:
    counts = Counter(row.prompt.label for row in rows)
    return {label: counts[label] for label in LABELS}


def _normal(row: Row) -> str:
    return _plain(row.prompt.prompt)


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()

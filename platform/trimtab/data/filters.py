"""The hard filter: which rows may teach, as named rules, with a table of what each removed.

STA calls this hard weighting (weights of 0 or 1): stringent filtering gives clear, unbiased signals [paper]. The rules are
ours; each can be switched off.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from trimtab.data.form import predictability
from trimtab.data.rows import Prompt, fraction
from trimtab.judges.refusal import STEPS, judge
from trimtab.words import LABELS, RULES, Label, Rule

MIN_TOKENS, MAX_TOKENS = 8, 512
NEAR = 92.0
LEAKING = re.compile(r"\b(?:sure|certainly|of course|here (?:is|are)|here's|step \d|first,)\b", re.IGNORECASE)


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
    """What is left, the table, and how well form alone tells harmful from benign before and after (0.5 to 1)."""

    rows: list[Row]
    table: list[Step]
    form_before: float
    form_after: float


def hard_filter(rows: Sequence[Row], rules: Sequence[Rule] = RULES, seed: int = 0) -> Filtered:
    """Apply the rules in order. `rules` may leave some out; their order is fixed."""
    kept = list(rows)
    table = [Step("(start)", {}, _count(kept))]
    for rule in RULES:
        if rule not in rules:
            continue
        after = APPLY[rule](kept, seed)
        removed: Counter[Label] = Counter(r.prompt.label for r in kept)
        removed.subtract(r.prompt.label for r in after)
        table.append(Step(rule, dict(removed), _count(after)))
        kept = after
    return Filtered(kept, table, predictability([r.prompt for r in rows]), predictability([r.prompt for r in kept]))


def _agreed(rows: Sequence[Row], seed: int) -> list[Row]:
    """(a) No prompt that sources label both harmful and benign."""
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(_normal(row), set()).add(row.prompt.label == "harmful")
    return [row for row in rows if len(sides[_normal(row)]) == 1]


def _clear(rows: Sequence[Row], seed: int) -> list[Row]:
    """(b) The target is a clear refusal (harmful) or clear help (benign); partial refusals go."""
    wanted = {label: "refusal" if label == "harmful" else "compliance" for label in LABELS}
    return [row for row in rows if judge(row.target) == wanted[row.prompt.label]]


def _leak(rows: Sequence[Row], seed: int) -> list[Row]:
    """(c) A harmful row's target gives no steps and no opening of help."""
    return [
        row for row in rows if row.prompt.label != "harmful" or not (STEPS.search(row.target) or LEAKING.search(row.target))
    ]


def _length(rows: Sequence[Row], seed: int) -> list[Row]:
    """(d) 8 to 512 target tokens, and the part that is learned from is whole."""
    return [row for row in rows if MIN_TOKENS <= row.tokens <= MAX_TOKENS and not row.cut]


def _duplicate(rows: Sequence[Row], seed: int) -> list[Row]:
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


def _balanced(rows: Sequence[Row], seed: int) -> list[Row]:
    """(f) As many harmful rows as benign ones: the larger side loses rows at random."""
    sides = {True: [r for r in rows if r.prompt.label == "harmful"], False: [r for r in rows if r.prompt.label != "harmful"]}
    size = min(len(side) for side in sides.values())
    return [
        row
        for side in sides.values()
        for row in sorted(side, key=lambda r: fraction(f"{r.prompt.prompt}|{r.prompt.system}", seed))[:size]
    ]


APPLY: dict[Rule, Callable[[Sequence[Row], int], list[Row]]] = {
    "agreed": _agreed,
    "clear": _clear,
    "leak": _leak,
    "length": _length,
    "duplicate": _duplicate,
    "balanced": _balanced,
}


def _count(rows: Sequence[Row]) -> dict[Label, int]:
    counts = Counter(row.prompt.label for row in rows)
    return {label: counts[label] for label in LABELS}


def _normal(row: Row) -> str:
    return re.sub(r"\W+", " ", row.prompt.prompt.lower()).strip()

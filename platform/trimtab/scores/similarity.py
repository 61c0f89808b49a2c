"""Similarities: whether two answers say the same, for the scores that count meanings.

A similarity gives a likeness, and answers from a threshold up are alike. It is chosen by name, with a threshold of one's own
after a colon: `overlap:0.8`. Packages in the entry-point group `trimtab.scores` may `add` theirs.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from torch.nn.functional import cosine_similarity

from trimtab.errors import NotFoundError, UsageError
from trimtab.scores import Generation

Likeness = Callable[[Generation, Generation], float]
Same = Callable[[Generation, Generation], bool]


def compare_exact(one: Generation, other: Generation) -> float:
    """1 where the normalised words are the same, else 0."""
    return float(one.words == other.words)


def compare_overlap(one: Generation, other: Generation) -> float:
    """F1 of the normalised words, from 0 to 1; 1 where both have none."""
    return _f1(one.words, other.words)


def compare_new_words(one: Generation, other: Generation) -> float:
    """The same of the words that the question does not hold, which alone tell "The capital of France is Paris" from "... is
    Lyon"; of all words where one answer has no others (ours)."""
    return _f1(one.news, other.news) if one.news and other.news else _f1(one.words, other.words)


def compare_states(one: Generation, other: Generation) -> float:
    """Cosine of the frozen model's own last states at the highest layer collected (ours: no second model is needed, as an
    entailment model would be)."""
    return cosine_similarity(one.state[-1].double(), other.state[-1].double(), dim=0).item()


KNOWN: dict[str, tuple[Likeness, float]] = {
    "exact": (compare_exact, 1.0),
    "overlap": (compare_overlap, 0.7),
    "news": (compare_new_words, 0.5),
    # Last states of all answers to a question are alike: a high threshold parts them at all.
    "states": (compare_states, 0.97),
}


def register_similarity(name: str, likeness: Likeness, threshold: float) -> None:
    """Make a similarity known by this name, with the threshold that it has where none is given."""
    KNOWN[name] = (likeness, threshold)


def build_similarity(similarity: str) -> Same:
    """The test that a name, or a name with a threshold as in `states:0.95`, stands for.

    Raises NotFoundError for an unknown name, UsageError for a threshold that is no number.
    """
    name, colon, given = similarity.partition(":")
    if name not in KNOWN:
        raise NotFoundError(f"no similarity {name!r}; there are: {', '.join(KNOWN)}")
    likeness, threshold = KNOWN[name]
    if colon:
        try:
            threshold = float(given)
        except ValueError:
            raise UsageError(
                f"similarity {similarity!r}: the threshold after the colon must be a number, as in overlap:0.8"
            ) from None
    return lambda one, other: likeness(one, other) >= threshold


def cluster_generations(samples: Sequence[Generation], similarity: str) -> list[list[Generation]]:
    """Samples by meaning: each joins the first cluster whose first member it is like (Kuhn et al. 2023)."""
    alike = build_similarity(similarity)
    found: list[list[Generation]] = []
    for sample in samples:
        mine = next((cluster for cluster in found if alike(cluster[0], sample)), None)
        if mine is None:
            found.append([sample])
        else:
            mine.append(sample)
    return found


def _f1(one: str, other: str) -> float:
    ours, theirs = one.split(), other.split()
    if not ours and not theirs:
        return 1.0
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))

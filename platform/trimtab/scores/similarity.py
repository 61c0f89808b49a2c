"""Similarities of answers, for scores that compare meanings.

A similarity function returns a likeness; two answers count as the same if it reaches a threshold. The similarity is selected by
name, with an optional threshold after a colon: `overlap:0.8`. Packages in the entry-point group `trimtab.scores` can add others
with `register_similarity`.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from torch.nn.functional import cosine_similarity

from trimtab.errors import NotFoundError, UsageError
from trimtab.scores import Generation

Likeness = Callable[[Generation, Generation], float]
Same = Callable[[Generation, Generation], bool]


def compare_exact(one: Generation, other: Generation) -> float:
    """Return 1 if the normalized words are equal, else 0."""
    return float(one.words == other.words)


def compare_overlap(one: Generation, other: Generation) -> float:
    """Return the F1 of the normalized words, from 0 to 1; 1 if both answers have none."""
    return _compute_f1(one.words, other.words)


def compare_new_words(one: Generation, other: Generation) -> float:
    """Return the F1 of the words that the question does not contain, from 0 to 1 [trimtab].

    Only these words distinguish "The capital of France is Paris" from "... is Lyon". If an answer has no such words, all words
    are compared.
    """
    return _compute_f1(one.news, other.news) if one.news and other.news else _compute_f1(one.words, other.words)


def compare_states(one: Generation, other: Generation) -> float:
    """Return the cosine similarity of the frozen model's last states at the highest collected layer [trimtab].

    Unlike an entailment model, this needs no second model.
    """
    return cosine_similarity(one.state[-1].double(), other.state[-1].double(), dim=0).item()


SIMILARITIES: dict[str, tuple[Likeness, float]] = {
    "exact": (compare_exact, 1.0),
    "overlap": (compare_overlap, 0.7),
    "news": (compare_new_words, 0.5),
    # Last states of all answers to a question are similar; only a high threshold separates them.
    "states": (compare_states, 0.97),
}


def register_similarity(name: str, likeness: Likeness, threshold: float) -> None:
    """Register a similarity function.

    Args:
        name: name of the similarity.
        likeness: function of two answers.
        threshold: default threshold from which two answers count as the same.
    """
    SIMILARITIES[name] = (likeness, threshold)


def build_similarity(similarity: str) -> Same:
    """Build the comparison of two answers for a similarity.

    Args:
        similarity: registered name, or name and threshold as in `states:0.95`.

    Raises:
        NotFoundError: if the name is unknown.
        UsageError: if the threshold is not a number.
    """
    name, colon, threshold_text = similarity.partition(":")
    if name not in SIMILARITIES:
        raise NotFoundError(f"no similarity {name!r}; there are: {', '.join(SIMILARITIES)}")
    likeness, threshold = SIMILARITIES[name]
    if colon:
        try:
            threshold = float(threshold_text)
        except ValueError:
            raise UsageError(
                f"similarity {similarity!r}: the threshold after the colon must be a number, as in overlap:0.8"
            ) from None
    return lambda one, other: likeness(one, other) >= threshold


def cluster_generations(samples: Sequence[Generation], similarity: str) -> list[list[Generation]]:
    """Cluster samples by meaning: each joins the first cluster whose first member is the same (Kuhn et al. 2023).

    Args:
        samples: samples to cluster.
        similarity: registered name, optionally with a threshold.
    """
    is_same = build_similarity(similarity)
    clusters: list[list[Generation]] = []
    for sample in samples:
        matching = next((cluster for cluster in clusters if is_same(cluster[0], sample)), None)
        if matching is None:
            clusters.append([sample])
        else:
            matching.append(sample)
    return clusters


def _compute_f1(one: str, other: str) -> float:
    first_words, second_words = one.split(), other.split()
    if not first_words and not second_words:
        return 1.0
    return 2 * sum((Counter(first_words) & Counter(second_words)).values()) / (len(first_words) + len(second_words))

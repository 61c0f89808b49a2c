"""Length-normalised entropy (Malinin and Gales 2021): how unlikely drawn answers are, for each of their tokens."""

from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register


@register("ln-entropy")
class LnEntropy(Score):
    """(1/K) sum_k (1/m_k) sum_t log p(y_{k,t}) over K samples: minus the Monte-Carlo estimate of the entropy of whole answers,
    each normalised by its length. Generates the samples."""

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    def score_answer(self, seen: ScoreInputs) -> float:
        """Mean over the samples of their mean log-prob."""
        return sum(s.logp for s in seen.samples) / len(seen.samples)

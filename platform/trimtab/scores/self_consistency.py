"""Self-consistency (Wang et al. 2023): how many of the samples say what the answer says."""

from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register
from trimtab.scores.similarity import build_similarity


@register("self-consistency")
class SelfConsistency(Score):
    """(1/K) sum_k [sample k says the same as the answer]. The paper votes for an answer among the samples; here the answer is
    given, and its share of the votes is the score (ours). Generates the samples."""

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    def score_answer(self, seen: ScoreInputs) -> float:
        """Share of the samples, from 0 to 1."""
        alike = build_similarity(self.similarity)
        return sum(alike(seen.answer, sample) for sample in seen.samples) / len(seen.samples)

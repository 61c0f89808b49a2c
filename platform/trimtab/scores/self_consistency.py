"""Self-consistency (Wang et al. 2023): share of the samples that agree with the answer."""

from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register
from trimtab.scores.similarity import build_similarity


@register("self-consistency")
class SelfConsistency(Score):
    """(1/K) sum_k [sample k says the same as the answer].

    The paper selects an answer by a vote among the samples. Here the answer is given, and its share of the votes is the score
    [trimtab]. The score requires generated samples.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the share of agreeing samples, from 0 to 1."""
        is_same = build_similarity(self.similarity)
        return sum(is_same(inputs.answer, sample) for sample in inputs.samples) / len(inputs.samples)

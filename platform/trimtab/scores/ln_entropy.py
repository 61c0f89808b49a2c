"""Length-normalized entropy of sampled answers (Malinin and Gales 2021)."""

from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register


@register("ln-entropy")
class LnEntropy(Score):
    """(1/K) sum_k (1/m_k) sum_t log p(y_{k,t}) over K samples.

    This is minus the Monte Carlo estimate of the entropy of whole answers, each normalized by its length. The score requires
    generated samples.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the mean over the samples of their mean log-probability."""
        return sum(s.logp for s in inputs.samples) / len(inputs.samples)

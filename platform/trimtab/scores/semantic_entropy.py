"""Semantic entropy (Kuhn et al. 2023; Farquhar et al. 2024): entropy over the meanings of the samples."""

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.scores import Need, Score, ScoreInputs, register
from trimtab.scores.similarity import cluster_generations


@register("semantic-entropy")
class SemanticEntropy(Score):
    """sum_c p_c log p_c over clusters c of samples with the same meaning.

    p_c = sum_{k in c} p_k / sum_k p_k, with p_k the length-normalized probability of sample k: the Rao-Blackwellized form
    (Farquhar et al. 2024). The score requires generated samples.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    least: ClassVar[int] = 2

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return minus the entropy, in nats."""
        clusters = cluster_generations(inputs.samples, self.similarity)
        mass = torch.stack([torch.tensor([s.logp for s in cluster]).double().logsumexp(0) for cluster in clusters])
        return -_entropy(mass.softmax(0))


@register("discrete-semantic-entropy")
class DiscreteSemanticEntropy(Score):
    """sum_c p_c log p_c over clusters c, with p_c the share of the samples in c.

    This form is for models that expose no probabilities (Farquhar et al. 2024). The score requires generated samples.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    least: ClassVar[int] = 2

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return minus the entropy, in nats."""
        counts = torch.tensor([len(cluster) for cluster in cluster_generations(inputs.samples, self.similarity)]).double()
        return -_entropy(counts / counts.sum())


def _entropy(shares: Tensor) -> float:
    return torch.special.entr(shares).sum().item()

"""Semantic entropy (Kuhn et al. 2023; Farquhar et al. 2024): how many things the samples say, not in how many words."""

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.scores import Need, Score, ScoreInputs, register
from trimtab.scores.similarity import cluster_generations


@register("semantic-entropy")
class SemanticEntropy(Score):
    """sum_c p_c log p_c over clusters c of samples that say the same, p_c = sum_{k in c} p_k / sum_k p_k and p_k the
    length-normalised probability of sample k: the Rao-Blackwellised form (Farquhar et al. 2024). Generates the samples."""

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    least: ClassVar[int] = 2

    def score_answer(self, seen: ScoreInputs) -> float:
        """Minus the entropy, in nats."""
        found = cluster_generations(seen.samples, self.similarity)
        mass = torch.stack([torch.tensor([s.logp for s in cluster]).double().logsumexp(0) for cluster in found])
        return -_entropy(mass.softmax(0))


@register("discrete-semantic-entropy")
class DiscreteSemanticEntropy(Score):
    """The same with p_c the share of the samples that are in c (Farquhar et al. 2024, for models that show no
    probabilities). Generates the samples."""

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    least: ClassVar[int] = 2

    def score_answer(self, seen: ScoreInputs) -> float:
        """Minus the entropy, in nats."""
        counts = torch.tensor([len(cluster) for cluster in cluster_generations(seen.samples, self.similarity)]).double()
        return -_entropy(counts / counts.sum())


def _entropy(shares: Tensor) -> float:
    return torch.special.entr(shares).sum().item()

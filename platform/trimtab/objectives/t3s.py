"""Token selection by training trajectory: after a first pass, train only on tokens whose likelihood it did not raise."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.objectives import Need, Objective, Scores, register


@register("t3s")
@dataclass(frozen=True)
class T3s(Objective):
    """Before the switch l_i; after it l_i over the tokens with log p_b(y_t) - log p(y_t) <= threshold, p_b under the anchor.

    Masking the tokens that the first pass has learned is the paper's idea. The paper takes the vectors at the bottleneck of
    accuracy; this version takes those after a fixed share of the steps and continues from them [trimtab]. A row whose tokens
    are all masked has no loss.

    Args:
        switch: share of the steps after which the anchor is taken.
        threshold: increase of a token's log-probability, in nats, above which it is masked.
    """

    switch: float = 0.3
    threshold: float = 0.5

    @property
    def needs(self) -> frozenset[Need]:
        """Targets under the base model and under the anchor."""
        return frozenset({"reference", "anchor"})

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the loss [B], in nats."""
        if not len(scores.anchor):
            return scores.nll
        mask = scores.mask * (scores.anchor - scores.reference <= self.threshold)
        return -(scores.logp * mask).sum(1) / mask.sum(1).clamp_min(1)

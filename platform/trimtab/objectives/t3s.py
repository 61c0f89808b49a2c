"""Token selection by the training trajectory: after a first pass, learn only from tokens that it did not lift."""

from dataclasses import dataclass

from torch import Tensor

from trimtab.objectives import Need, Objective, Scores, register


@register("t3s")
@dataclass(frozen=True)
class T3s(Objective):
    """Before the switch l_i; after it l_i over the tokens with log p_b(y_t) - log p(y_t) <= threshold, p_b under the anchor.

    Masking what the first pass has learned is the paper's; the paper takes the vectors at the bottleneck of accuracy, we take
    those after a fixed share of the steps and go on from them [ours]. A row whose tokens are all masked has no loss.

    Args:
        switch: share of the steps after which the anchor is taken.
        threshold: rise of a token's log-probability, in nats, above which it is masked.
    """

    switch: float = 0.3
    threshold: float = 0.5

    @property
    def needs(self) -> frozenset[Need]:
        """Targets under the base model and under the anchor."""
        return frozenset({"reference", "anchor"})

    def __call__(self, scores: Scores) -> Tensor:
        """Loss [B], in nats."""
        if not len(scores.anchor):
            return scores.nll
        kept = scores.mask * (scores.anchor - scores.reference <= self.threshold)
        return -(scores.logp * kept).sum(1) / kept.sum(1).clamp_min(1)

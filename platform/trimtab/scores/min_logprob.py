"""The least likely token: an answer is as sure as its weakest word."""

from trimtab.scores import Score, Seen, register


@register("min-logprob")
class MinLogprob(Score):
    """min_t l_t (Manakul et al. 2023 take its negative, "Max(-log p)"). Generates nothing."""

    def one(self, seen: Seen) -> float:
        """Lowest log-prob."""
        return seen.trace[:, 0].min().item()

"""p(True) (Kadavath et al. 2022): the model is asked whether its own answer is true."""

import math
from collections.abc import Iterable
from typing import ClassVar

from trimtab.scores import Need, Score, Seen, register

TRUE, FALSE = "A", "B"
# A probability of exactly 0 or 1 has no log-odds.
NEAREST = 1e-6
ABOUT = " \t\n().:*\"'"


@register("p-true")
class PTrue(Score):
    """log(p / (1 - p)), p the probability of the letter for "True" against the letter for "False" as the first token of the
    reply to `question`. The paper asks a base model to go on with its text, here a chat model is asked (ours). Generates one
    token."""

    needs: ClassVar[frozenset[Need]] = frozenset({"p_true"})

    def one(self, seen: Seen) -> float:
        """Log-odds of the probability that was collected."""
        p = min(max(0.5 if seen.p_true is None else seen.p_true, NEAREST), 1 - NEAREST)
        return math.log(p / (1 - p))


def question(asked: str, answer: str) -> str:
    """What the model is asked about its answer to what it was asked; the words are the paper's, the last line is ours."""
    return (
        f"Question: {asked}\nProposed Answer: {answer}\nIs the proposed answer:\n ({TRUE}) True\n ({FALSE}) False\n"
        f"Reply with the letter {TRUE} or {FALSE} only."
    )


def probability(likeliest: Iterable[tuple[str, float]]) -> float:
    """P(A) / (P(A) + P(B)) from the likeliest first tokens with their natural log-probabilities; at least one of them.

    Tokens that differ by spaces or brackets are one letter. A letter that is not among them is taken to be as likely as the
    last of them, which it is at most (ours).
    """
    listed = [(text.strip(ABOUT), math.exp(logp)) for text, logp in likeliest]
    last = min(p for _, p in listed)
    true, false = (sum(p for text, p in listed if text == letter) or last for letter in (TRUE, FALSE))
    return true / (true + false) if true + false else 0.5

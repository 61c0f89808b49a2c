"""p(True) (Kadavath et al. 2022): the model is asked whether its own answer is true."""

import math
from collections.abc import Iterable
from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register

TRUE, FALSE = ("A", "True"), ("B", "False")
# A probability of exactly 0 or 1 has no log-odds.
NEAREST = 1e-6
ABOUT = " \t\n().:*\"'"


@register("p-true")
class PTrue(Score):
    """log(p / (1 - p)), p the probability of the letter for "True" against the letter for "False" as the first token of the
    reply to `question` [paper]. The paper has a base model go on with a text; here a chat model is asked, and the words count
    as their letters do, as small models reply with either (ours). Generates one token."""

    needs: ClassVar[frozenset[Need]] = frozenset({"p_true"})

    def score_answer(self, seen: ScoreInputs) -> float:
        """Log-odds of the probability that was collected."""
        p = min(max(0.5 if seen.p_true is None else seen.p_true, NEAREST), 1 - NEAREST)
        return math.log(p / (1 - p))


def build_p_true_question(asked: str, answer: str) -> str:
    """What the model is asked about its `answer` to what it was `asked`: the form is the paper's, the last line is ours."""
    return (
        f"Question: {asked}\nProposed Answer: {answer}\nIs the proposed answer:\n"
        f" ({TRUE[0]}) {TRUE[1]}\n ({FALSE[0]}) {FALSE[1]}\nReply with the letter {TRUE[0]} or {FALSE[0]} only."
    )


def compute_p_true(likeliest: Iterable[tuple[str, float]]) -> float:
    """P(A) / (P(A) + P(B)) from the likeliest first tokens with their natural log-probabilities; at least one of them.

    Tokens that differ by spaces or brackets are one. A side that is not among them is taken to be as likely as the last of
    them, which none of its tokens exceeds (ours).
    """
    listed = [(text.strip(ABOUT), math.exp(logp)) for text, logp in likeliest]
    last = min(p for _, p in listed)
    true, false = (sum(p for text, p in listed if text in side) or last for side in (TRUE, FALSE))
    return true / (true + false) if true + false else 0.5

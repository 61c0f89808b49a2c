"""p(True) (Kadavath et al. 2022): the model's own judgment of whether its answer is true."""

import math
from collections.abc import Iterable
from typing import ClassVar

from trimtab.scores import Need, Score, ScoreInputs, register

TRUE, FALSE = ("A", "True"), ("B", "False")
# Probabilities are clamped to this distance from 0 and 1, which have no finite log-odds.
NEAREST = 1e-6
ABOUT = " \t\n().:*\"'"


@register("p-true")
class PTrue(Score):
    """log(p / (1 - p)), p the probability of the letter for "True" relative to the letter for "False" [paper].

    The probabilities are those of the first token of the reply to `build_p_true_question`. In the paper a base model continues
    a text. Here a chat model replies to a question, and the words count as their letters, because small models reply with
    either [trimtab]. The score requires one generated token.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"p_true"})

    def score_answer(self, inputs: ScoreInputs) -> float:
        """Return the log-odds of the collected probability."""
        p = min(max(0.5 if inputs.p_true is None else inputs.p_true, NEAREST), 1 - NEAREST)
        return math.log(p / (1 - p))


def build_p_true_question(question: str, answer: str) -> str:
    """Build the question whether an answer is true, in the paper's form with an additional last line [trimtab].

    Args:
        question: question that was answered.
        answer: answer of the model.
    """
    return (
        f"Question: {question}\nProposed Answer: {answer}\nIs the proposed answer:\n"
        f" ({TRUE[0]}) {TRUE[1]}\n ({FALSE[0]}) {FALSE[1]}\nReply with the letter {TRUE[0]} or {FALSE[0]} only."
    )


def compute_p_true(likeliest: Iterable[tuple[str, float]]) -> float:
    """Compute P(A) / (P(A) + P(B)) from the most likely first tokens.

    Tokens that differ only in spaces or punctuation are merged. If a side has no token in the list, it gets the lowest listed
    probability, which is an upper bound for each of its tokens [trimtab].

    Args:
        likeliest: tokens with their natural log-probabilities; at least one.
    """
    tokens = [(text.strip(ABOUT), math.exp(logp)) for text, logp in likeliest]
    lowest = min(p for _, p in tokens)
    true, false = (sum(p for text, p in tokens if text in side) or lowest for side in (TRUE, FALSE))
    return true / (true + false) if true + false else 0.5

"""Grammatical form of prompts (question or order) and its balancing within each class.

In common prompt sets, harmful prompts are orders ("Write a ...") and benign prompts are questions ("How do I ..."). A vector
trained on them learns this difference instead of harm. trimtab therefore balances the form within each class before training.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.types import LABELS

Form = Literal["question", "order"]

QUESTION_START = re.compile(
    r"^(what|which|who|whom|whose|where|when|why|how|is|are|am|was|were|do|does|did|can|could|will|would|should|may|has|have)\b",
    re.IGNORECASE,
)
HOW_TO = re.compile(r"^how (?:do|can|could|should|would|might) (?:i|you|we|one|someone|people) (?P<rest>.+)$", re.IGNORECASE)
WHAT_IS = re.compile(r"^what (?P<verb>is|are|was|were) (?P<rest>.+)$", re.IGNORECASE)
CAN_YOU = re.compile(r"^(?:can|could|will|would) you (?:please )?(?P<rest>.+)$", re.IGNORECASE)

# Verbs of speech need another opener: "How do I give instructions" means something else than "Give instructions".
SPEECH_VERBS = frozenset(
    {
        "give",
        "provide",
        "write",
        "tell",
        "teach",
        "explain",
        "describe",
        "list",
        "show",
        "outline",
        "compose",
        "draft",
        "suggest",
        "name",
        "summarize",
        "discuss",
        "argue",
        "produce",
        "generate",
        "present",
        "offer",
        "instruct",
        "detail",
        "share",
    }
)
HOW_OPENERS = ("How do I {}?", "How can I {}?", "How would someone {}?", "How could I {}?")
CAN_OPENERS = ("Can you {}?", "Could you {}?", "Would you please {}?", "Can you help me and {}?")
TELL_OPENERS = ("Explain how to {}.", "Tell me how to {}.", "Describe how to {}.", "Show me how to {}.")


def get_form(text: str) -> Form:
    """Return the form of a prompt, determined from its first word and its final question mark."""
    return "question" if text.rstrip().endswith("?") or QUESTION_START.match(text.strip()) else "order"


def rewrite_form(text: str, seed: int = 0) -> str | None:
    """Rewrite a question as an order, or an order as a question.

    Args:
        text: prompt to rewrite.
        seed: seed of the choice among equivalent phrasings, which depends only on the text and this seed.

    Returns:
        The same request in the other form, or None if no rule applies.
    """
    body = text.strip().rstrip(".?! ")
    variant = int(hash_to_fraction(text, seed) * 4)
    if get_form(text) == "order":
        lowered = body[:1].lower() + body[1:]
        openers = CAN_OPENERS if lowered.split(" ")[0] in SPEECH_VERBS else HOW_OPENERS
        return openers[variant].format(lowered)
    if match := HOW_TO.match(body):
        return TELL_OPENERS[variant].format(match["rest"])
    if match := CAN_YOU.match(body):
        return match["rest"][:1].upper() + match["rest"][1:] + "."
    if (match := WHAT_IS.match(body)) and len(match["rest"].split()) <= 12:
        return f"Tell me what {match['rest']} {match['verb'].lower()}."
    return None


def balance_forms(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Rewrite prompts until half of each class are questions.

    Args:
        prompts: prompts of all classes.
        seed: seed of the choice of prompts and phrasings.

    Returns:
        The prompts in the same order and with the same groups. Prompts that no rule can rewrite are unchanged, so a class may
        remain unbalanced.
    """
    balanced = list(prompts)
    for label in LABELS:
        indices = [i for i, p in enumerate(prompts) if p.label == label]
        questions = [i for i in indices if get_form(prompts[i].prompt) == "question"]
        orders = [i for i in indices if get_form(prompts[i].prompt) == "order"]
        majority = questions if len(questions) > len(orders) else orders
        excess = abs(len(questions) - len(orders)) // 2
        for i in sorted(majority, key=lambda i: hash_to_fraction(prompts[i].prompt, seed)):
            if excess == 0:
                break
            rewritten = rewrite_form(prompts[i].prompt, seed)
            if rewritten is not None:
                balanced[i] = replace(prompts[i], prompt=rewritten)
                excess -= 1
    return balanced


def compute_predictability(prompts: Sequence[Prompt]) -> float:
    """Compute how well the form alone separates harmful from benign prompts.

    Returns:
        Balanced accuracy from 0.5 (chance) to 1. It is 0.5 if either side has no prompts.
    """
    questions = {True: 0, False: 0}
    totals = {True: 0, False: 0}
    for p in prompts:
        harmful = p.label == "harmful"
        totals[harmful] += 1
        questions[harmful] += get_form(p.prompt) == "question"
    if not all(totals.values()):
        return 0.5
    return 0.5 + abs(questions[True] / totals[True] - questions[False] / totals[False]) / 2

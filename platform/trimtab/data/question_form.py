"""Form: whether a prompt is a question or an order, and making sure that form does not give the class away.

In the common sets harmful prompts are orders ("Write a ...") and benign ones questions ("How do I ..."); one vector
learns that difference instead of harm. So form is balanced within each class before training (ours).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from trimtab.data.prompt import Prompt, hash_to_fraction
from trimtab.types import LABELS

Form = Literal["question", "order"]

ASKING = re.compile(
    r"^(what|which|who|whom|whose|where|when|why|how|is|are|am|was|were|do|does|did|can|could|will|would|should|may|has|have)\b",
    re.IGNORECASE,
)
HOW_TO = re.compile(r"^how (?:do|can|could|should|would|might) (?:i|you|we|one|someone|people) (?P<rest>.+)$", re.IGNORECASE)
WHAT_IS = re.compile(r"^what (?P<verb>is|are|was|were) (?P<rest>.+)$", re.IGNORECASE)
CAN_YOU = re.compile(r"^(?:can|could|will|would) you (?:please )?(?P<rest>.+)$", re.IGNORECASE)

# Verbs that ask for words: "How do I give instructions" would ask for something else than "Give instructions".
TELLING = frozenset(
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
    """Question or order, by its end and its first word."""
    return "question" if text.rstrip().endswith("?") or ASKING.match(text.strip()) else "order"


def rewrite_form(text: str, seed: int = 0) -> str | None:
    """The same request in the other form, or None where no plain rewriting is known."""
    body = text.strip().rstrip(".?! ")
    pick = int(hash_to_fraction(text, seed) * 4)
    if get_form(text) == "order":
        lowered = body[:1].lower() + body[1:]
        openers = CAN_OPENERS if lowered.split(" ")[0] in TELLING else HOW_OPENERS
        return openers[pick].format(lowered)
    if match := HOW_TO.match(body):
        return TELL_OPENERS[pick].format(match["rest"])
    if match := CAN_YOU.match(body):
        return match["rest"][:1].upper() + match["rest"][1:] + "."
    if (match := WHAT_IS.match(body)) and len(match["rest"].split()) <= 12:
        return f"Tell me what {match['rest']} {match['verb'].lower()}."
    return None


def balance_forms(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Rewrite as many prompts of each class as it takes for half of them to be questions.

    Order and groups stay; a prompt that cannot be rewritten stays as it is.
    """
    balanced = list(prompts)
    for label in LABELS:
        mine = [i for i, p in enumerate(prompts) if p.label == label]
        questions = [i for i in mine if get_form(prompts[i].prompt) == "question"]
        orders = [i for i in mine if get_form(prompts[i].prompt) == "order"]
        many = questions if len(questions) > len(orders) else orders
        excess = abs(len(questions) - len(orders)) // 2
        for i in sorted(many, key=lambda i: hash_to_fraction(prompts[i].prompt, seed)):
            if excess == 0:
                break
            rewritten = rewrite_form(prompts[i].prompt, seed)
            if rewritten is not None:
                balanced[i] = replace(prompts[i], prompt=rewritten)
                excess -= 1
    return balanced


def compute_predictability(prompts: Sequence[Prompt]) -> float:
    """How well form alone tells harmful from benign: balanced accuracy, 0.5 (not at all) to 1."""
    asked = {True: 0, False: 0}
    count = {True: 0, False: 0}
    for p in prompts:
        harmful = p.label == "harmful"
        count[harmful] += 1
        asked[harmful] += get_form(p.prompt) == "question"
    if not all(count.values()):
        return 0.5
    return 0.5 + abs(asked[True] / count[True] - asked[False] / count[False]) / 2

"""String-match refusal judge.

It classifies an answer from its words alone; see `trimtab.text.refusal_phrases` for the rules and their limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.text.refusal_phrases import classify_refusal
from trimtab.types import Verdict


@dataclass(frozen=True)
class StringMatch:
    """Refusal judge that matches refusal phrases.

    Attributes:
        name: display name.
        key: cache key of the verdicts.
    """

    name: str = "string match"
    key: str = "string"

    def judge_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer. The prompts are ignored."""
        return [classify_refusal(answer) for answer in answers]

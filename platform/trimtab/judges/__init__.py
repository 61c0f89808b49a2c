"""Judges of refusals and of right answers, one module per judge."""

from collections.abc import Sequence
from typing import Protocol

from trimtab.types import Verdict


class Judge(Protocol):
    """Interface of refusal judges."""

    @property
    def name(self) -> str:
        """Display name."""
        ...

    @property
    def key(self) -> str:
        """Cache key that identifies everything besides the texts on which the verdicts depend."""
        ...

    def judge_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Judge answers.

        Args:
            prompts: prompts, in the order of the answers.
            answers: one answer per prompt.

        Returns:
            One verdict per answer.

        Raises:
            TrimtabError: if the judge cannot give a verdict.
        """
        ...

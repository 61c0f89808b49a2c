"""Judges: what an answer is. One file for each refusal judge; answer judges for detectors stand beside them."""

from collections.abc import Sequence
from typing import Protocol

from trimtab.types import Verdict


class Judge(Protocol):
    """Gives verdicts. `name` is for people; `key` names all that the verdicts depend on besides the texts."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    def judge_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each answer to the prompt beside it. Raises errors of ours where there can be none."""
        ...

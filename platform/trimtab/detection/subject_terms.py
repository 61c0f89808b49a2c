"""Terms of the subjects of detectors, for tables and messages."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.types import Subject


@dataclass(frozen=True)
class SubjectTerms:
    """Terms of a subject.

    Attributes:
        rows: plural of a row.
        positives: plural of what a detector flags.
        negatives: plural of what it should not flag.
    """

    rows: str
    positives: str
    negatives: str


TERMS: Mapping[Subject, SubjectTerms] = {
    "answer": SubjectTerms("answers", "made-up answers", "right answers"),
    "prompt": SubjectTerms("prompts", "harmful prompts", "benign prompts"),
}

"""Agreement of a refusal judge with labeled answers: precision, recall and accuracy for the class refusal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from trimtab.errors import ArtifactError
from trimtab.judges.human_labels import LabeledAnswer
from trimtab.stats.intervals import Rate, compute_wilson_interval
from trimtab.types import Verdict

ALL, ON_TOPIC = "human labels", "human labels, on topic"
# Filter of each subset of the human labels on which judges are measured.
HUMAN: Mapping[str, Callable[[LabeledAnswer], bool]] = {ALL: lambda row: True, ON_TOPIC: lambda row: not row.off_topic}


@dataclass(frozen=True)
class JudgeAgreement:
    """Confusion counts of a judge on one set of labels.

    Attributes:
        on: name of the set of labels.
        both: answers that the judge and the labels call refusals (true positives).
        predicted: answers that the judge calls refusals, including partial ones.
        refused: answers that the labels call refusals.
        right: answers on which the judge and the labels agree.
        count: all answers.
    """

    on: str
    both: int
    predicted: int
    refused: int
    right: int
    count: int

    @property
    def precision(self) -> Rate:
        """Fraction of the refusals of the judge that are labeled as refusals."""
        return compute_wilson_interval(self.both, self.predicted)

    @property
    def recall(self) -> Rate:
        """Fraction of the labeled refusals that the judge finds."""
        return compute_wilson_interval(self.both, self.refused)

    @property
    def accuracy(self) -> Rate:
        """Fraction of the answers on which the judge and the labels agree."""
        return compute_wilson_interval(self.right, self.count)

    def as_json(self) -> dict[str, Any]:
        """Return counts and rates as JSON data; an undefined rate is null."""
        rates = {name: asdict(getattr(self, name)) for name in ("precision", "recall", "accuracy")}
        return asdict(self) | {
            name: {k: v if isfinite(v) else None for k, v in rate.items() if k != "count"} for name, rate in rates.items()
        }


@dataclass(frozen=True)
class JudgeStanding:
    """A judge with its agreement with labels.

    Attributes:
        judge: display name of the judge.
        agreements: agreement with each set of labels.
        note: how the agreements were measured, or why they were not.
    """

    judge: str
    agreements: Sequence[JudgeAgreement] = ()
    note: str = ""

    def format_line(self) -> str:
        """Return the line that is printed below a table."""
        figures = [
            f"on {a.count} {a.on}: precision {a.precision}, recall {a.recall}, accuracy {a.accuracy}" for a in self.agreements
        ]
        note = f" ({self.note})" if self.note else ""
        return f"judge: {self.judge}{note}; " + ("; ".join(figures) or "it was not compared with human labels")

    def as_json(self) -> dict[str, Any]:
        """Return JSON data for `--json` and reports."""
        return {"name": self.judge, "note": self.note, "agreements": [a.as_json() for a in self.agreements]}


def compute_agreement(verdicts: Sequence[Verdict], refused: Sequence[bool], on: str = ALL) -> JudgeAgreement:
    """Compare verdicts with labels. A partial refusal counts as a refusal.

    Args:
        verdicts: verdicts of a judge.
        refused: labels in the order of the verdicts, true for a refusal.
        on: name of the set of labels.
    """
    predicted = [verdict != "compliance" for verdict in verdicts]
    both = sum(p and r for p, r in zip(predicted, refused, strict=True))
    right = sum(p == r for p, r in zip(predicted, refused, strict=True))
    return JudgeAgreement(on, both, sum(predicted), sum(refused), right, len(predicted))


def compute_label_agreements(verdicts: Sequence[Verdict], rows: Sequence[LabeledAnswer]) -> list[JudgeAgreement]:
    """Compute the agreement on all human labels, and on the subset without off-topic answers.

    Args:
        verdicts: verdicts of a judge.
        rows: labeled answers in the order of the verdicts.
    """
    agreements: list[JudgeAgreement] = []
    for on, is_included in HUMAN.items():
        chosen = [i for i, row in enumerate(rows) if is_included(row)]
        agreements.append(compute_agreement([verdicts[i] for i in chosen], [rows[i].refused for i in chosen], on))
    return agreements


def parse_agreement(raw: object, location: str) -> JudgeAgreement:
    """Parse an agreement from the JSON data of `asdict`.

    Args:
        raw: JSON data.
        location: place of the data, for error messages.

    Raises:
        ArtifactError: if the data has other fields or types.
    """
    counts = [f.name for f in fields(JudgeAgreement) if f.name != "on"]
    if not isinstance(raw, dict) or set(raw) != {"on", *counts} or not isinstance(raw["on"], str):
        raise ArtifactError(f"{location}: an agreement has a text `on` and the counts {', '.join(counts)}")
    if not all(type(raw[name]) is int and raw[name] >= 0 for name in counts):
        raise ArtifactError(f"{location}: the counts of an agreement must be non-negative integers")
    return JudgeAgreement(**raw)

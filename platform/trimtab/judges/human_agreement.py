"""How a judge stands against labelled answers: precision, recall and accuracy, the refusals being the positives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from trimtab.errors import ArtifactError
from trimtab.judges.human_labels import LabeledAnswer
from trimtab.stats.intervals import Rate, compute_wilson_interval
from trimtab.types import Verdict

ALL, ON_TOPIC = "human labels", "human labels, on topic"
# Sets of labels that a judge is measured on.
HUMAN: Mapping[str, Callable[[LabeledAnswer], bool]] = {ALL: lambda row: True, ON_TOPIC: lambda row: not row.off_topic}


@dataclass(frozen=True)
class JudgeAgreement:
    """Counts on one set of labels (`on`): `said` answers that the judge calls refusals (partial ones too), `refused` ones that
    the labels do, `both`, `right` ones where the two are equal, and `count` in all."""

    on: str
    both: int
    said: int
    refused: int
    right: int
    count: int

    @property
    def precision(self) -> Rate:
        """The share of what the judge calls refusals that are."""
        return compute_wilson_interval(self.both, self.said)

    @property
    def recall(self) -> Rate:
        """The share of refusals that the judge finds."""
        return compute_wilson_interval(self.both, self.refused)

    @property
    def accuracy(self) -> Rate:
        """The share of answers that the judge is right about."""
        return compute_wilson_interval(self.right, self.count)

    def as_json(self) -> dict[str, Any]:
        """Counts and rates; a rate that does not exist is null."""
        rates = {name: asdict(getattr(self, name)) for name in ("precision", "recall", "accuracy")}
        return asdict(self) | {
            name: {k: v if isfinite(v) else None for k, v in rate.items() if k != "count"} for name, rate in rates.items()
        }


@dataclass(frozen=True)
class JudgeStanding:
    """A judge and how it stands against labels. `note` says how that was found out, or why it was not."""

    judge: str
    agreements: Sequence[JudgeAgreement] = ()
    note: str = ""

    def format_line(self) -> str:
        """For under a table."""
        shown = [
            f"on {a.count} {a.on}: precision {a.precision}, recall {a.recall}, accuracy {a.accuracy}" for a in self.agreements
        ]
        note = f" ({self.note})" if self.note else ""
        return f"judge: {self.judge}{note}; " + ("; ".join(shown) or "it was not compared with human labels")

    def as_json(self) -> dict[str, Any]:
        """For `--json` and reports."""
        return {"name": self.judge, "note": self.note, "agreements": [a.as_json() for a in self.agreements]}


def compute_agreement(verdicts: Sequence[Verdict], refused: Sequence[bool], on: str = ALL) -> JudgeAgreement:
    """Compare verdicts with what humans said (`refused`), a partial refusal counting as a refusal."""
    said = [verdict != "compliance" for verdict in verdicts]
    both = sum(s and r for s, r in zip(said, refused, strict=True))
    right = sum(s == r for s, r in zip(said, refused, strict=True))
    return JudgeAgreement(on, both, sum(said), sum(refused), right, len(said))


def compute_label_agreements(verdicts: Sequence[Verdict], rows: Sequence[LabeledAnswer]) -> list[JudgeAgreement]:
    """Agreement on all the human labels, and on those that are left without answers to another question."""
    found: list[JudgeAgreement] = []
    for on, wanted in HUMAN.items():
        chosen = [i for i, row in enumerate(rows) if wanted(row)]
        found.append(compute_agreement([verdicts[i] for i in chosen], [rows[i].refused for i in chosen], on))
    return found


def parse_agreement(raw: object, where: str) -> JudgeAgreement:
    """An agreement from JSON that `asdict` gave. Raises ArtifactError for anything else."""
    counts = [f.name for f in fields(JudgeAgreement) if f.name != "on"]
    if not isinstance(raw, dict) or set(raw) != {"on", *counts} or not isinstance(raw["on"], str):
        raise ArtifactError(f"{where}: an agreement has a text `on` and the counts {', '.join(counts)}")
    if not all(type(raw[name]) is int and raw[name] >= 0 for name in counts):
        raise ArtifactError(f"{where}: the counts of an agreement are whole numbers")
    return JudgeAgreement(**raw)

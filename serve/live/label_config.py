"""Settings of the commands `trimtab feedback`."""

from dataclasses import dataclass, field

from trimtab.detection.live_labels import RESERVED_FRACTION, check_reserved_fraction
from trimtab.errors import UsageError
from trimtab.types import Label, Subject


@dataclass(frozen=True)
class FeedbackImportConfig:
    """Import labels of stored answers and prompts from a file.

    They count as labels of raters that you trust.

    Args:
        file: file (.jsonl, .json, .csv, .parquet) with the columns id, correct (about the answer) or harmful (about the
            prompt) and, if there are several answers or raters, choice and rater.
        signals: folder or bucket of `trimtab serve --keep_signals`.
        columns: other names of the columns, as --columns.correct NAME.
    """

    file: str
    signals: str = field(kw_only=True)
    columns: dict[str, str] = field(default_factory=dict[str, str], kw_only=True)


@dataclass(frozen=True)
class FeedbackListConfig:
    """List the stored answers and prompts, and their labels.

    Args:
        signals: folder or bucket of `trimtab serve --keep_signals`.
    """

    signals: str


@dataclass(frozen=True)
class FeedbackAskConfig:
    """Select stored answers or prompts that are worth a label.

    Most are uncertain and differ from each other; a random share calibrates detectors and decides gates.

    Args:
        signals: folder or bucket of `trimtab serve --keep_signals`.
        count: number of answers or prompts.
        out: CSV file to write, with an empty column correct, or harmful for prompts, for `trimtab feedback import`.
        reserved_fraction: share of random rows, which no detector is trained on; that of `trimtab detect`.
        seed: seed of the random share.
        subject: rows to select, answer or prompt.
    """

    signals: str
    count: int = field(default=50, kw_only=True)
    out: str | None = field(default=None, kw_only=True)
    reserved_fraction: float = field(default=RESERVED_FRACTION, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    subject: Subject = field(default="answer", kw_only=True)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count must be at least 1, not {self.count}")
        check_reserved_fraction(self.reserved_fraction)


@dataclass(frozen=True)
class FeedbackPromptsConfig:
    """Write prompts whose answers were labeled as wrong to a file for trimtab align.

    trimtab stores no text: the prompts come from a file of yours, such as a log of refused requests.

    Args:
        file: file (.jsonl, .json, .csv, .parquet) with the columns id, prompt and, if there is one, system.
        signals: folder or bucket of `trimtab serve --keep_signals`, with the labels.
        out: JSONL file to write, for `trimtab align --data.benign+`.
        label: class of the prompts: benign_hard for prompts that were refused wrongly, harmful for prompts that were answered
            wrongly.
        trusted: use labels of trusted raters only.
        columns: other names of the columns, as --columns.prompt NAME.
    """

    file: str
    signals: str = field(kw_only=True)
    out: str = field(kw_only=True)
    label: Label = field(default="benign_hard", kw_only=True)
    trusted: bool = field(default=True, kw_only=True)
    columns: dict[str, str] = field(default_factory=dict[str, str], kw_only=True)

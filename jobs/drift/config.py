"""Configuration of the drift command."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.types import DEFAULT_BASE


@dataclass(frozen=True)
class DriftConfig:
    """Compare the signals of live traffic with those that a detector was trained on.

    Args:
        signals: data set of stored answers, a folder in that of `trimtab serve --keep_signals`.
        detector: detector: NAME, NAME@ALIAS or NAME@VERSION.
        reference: folders of data sets to compare with; if omitted, the training data of the detector.
        average_run_length: lower bound of the mean number of answers until a false alarm.
        base: base model; must match the signals.
        revision: revision of a Hugging Face id.
    """

    signals: str = ""
    detector: str = "truth"
    reference: list[str] | str = field(default_factory=list[str])
    average_run_length: float = 10_000
    base: str = DEFAULT_BASE
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.signals:
            raise UsageError("signals is required. Pass --signals FOLDER, a data set of trimtab serve --keep_signals")
        if self.average_run_length < 10:
            raise UsageError(f"average_run_length must be at least 10 answers, not {self.average_run_length:g}")

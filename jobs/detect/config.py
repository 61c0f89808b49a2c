"""Settings of the detect command."""

from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UsageError


@dataclass(frozen=True)
class DetectConfig:
    """Train detectors on collected signals, choose on validation, report on test.

    Args:
        signals: folder that `trimtab collect` wrote.
        head: heads to train, the first one to be saved: flag, linear, saplma, mlp, sep, haloscope; all is every one of them
            that the data allow.
        settings: settings of the first head to try, as --settings.groups '[4, 8, 16]': a list is a choice.
        layers: layers to try, each alone and all together; those of the data set without any.
        seeds: seeds, each with a split of its own.
        test: share of the questions for the report.
        validation: share of the questions to choose and calibrate on.
        labels: share of the training labels that is used; the rest counts as unlabelled.
        similarity: how scores and the head sep tell that samples say the same: exact, overlap, news or states, or one of
            these with a threshold, as overlap:0.8.
        name: name of the detector.
        out: folder to save the detector to; without it, among this machine's runs.
        register: keep the detector in the registry, as candidate.
        gain: AUROC on validation above the best training-free score and the present champion that makes a champion.
        base: base model, to check the signals against.
        revision: revision of a Hugging Face id.
        address: Ray cluster to run on.
    """

    signals: str = ""
    head: list[str] | str = "flag"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    layers: list[int] = field(default_factory=list[int])
    seeds: int = 5
    test: float = 0.25
    validation: float = 0.1
    labels: float = 1.0
    similarity: str = "news"
    name: str = "truth"
    out: str | None = None
    register: bool = True
    gain: float = 0.0
    base: str = "smollm2-135m"
    revision: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_split_shares(self.signals, self.seeds, self.validation, self.test)
        if not 0 < self.labels <= 1:
            raise UsageError(f"labels must be above 0 and at most 1, not {self.labels}")


def check_split_shares(signals: list[str] | str, seeds: int, validation: float, test: float) -> None:
    """Raise UsageError for signals that are not named, and for seeds and shares that leave nothing to learn from."""
    if not signals:
        raise UsageError("say where the signals are, with --signals FOLDER; trimtab collect makes one")
    if not 1 <= seeds <= 100:
        raise UsageError(f"seeds must be from 1 to 100, not {seeds}")
    if not (0 < test < 1 and 0 < validation < 1 and test + validation < 0.95):
        raise UsageError(f"test ({test}) and validation ({validation}) must leave some answers to train on")

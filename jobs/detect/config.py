"""Configuration of the detect command."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab.detection.live_labels import RESERVED_FRACTION, check_reserved_fraction
from trimtab.errors import UsageError
from trimtab.evaluation.gate import GateRule
from trimtab.jobs.runtime.config import as_source_list
from trimtab.types import DEFAULT_BASE

Split = Literal["random", "time"]
MAX_WEIGHT = 100


@dataclass(frozen=True)
class GateConfig:
    """Gate on the validation part that a detector must pass to become champion.

    Args:
        min_improvement: margin by which the AUROC must exceed that of the best training-free score and of the current champion.
        rule: interval requires the whole 95 % interval of the improvement to be above min_improvement, point the point estimate
            only; the first champion of a name needs the point estimate only.
    """

    min_improvement: float = 0.0
    rule: GateRule = "interval"


@dataclass(frozen=True)
class DetectConfig:
    """Train detectors on collected signals, select on validation and report on test data.

    Args:
        signals: folders of data sets, of answers or of prompts, that `trimtab collect` or `trimtab serve --keep_signals` wrote.
            They are merged at their common layers.
        signal_weights: how often the rows of each folder count in training, in the order of signals; by default once. With
            auto, labels of live traffic choose the weight of collected rows, which may be none.
        head: heads to train; the first one is saved: flag, linear, saplma, mlp, sep, haloscope; all selects every head that
            the data set supports.
        head_options: settings of the first head, as --head_options.groups '[4, 8, 16]': a list is a set of choices to try.
        layers: layers to try, each alone and all together; if omitted, the layers of the data set.
        test_signals: folders of further data sets to measure the saved detector on.
        num_seeds: number of seeds, each with its own split.
        test_fraction: share of the questions for the test part.
        validation_fraction: share of the questions for model selection and calibration.
        label_fraction: share of the training labels to use; the other training answers count as unlabeled.
        similarity: similarity by which scores and the sep head compare samples: exact, overlap, news or states, or one of
            these with a threshold, as overlap:0.8.
        name: name of the detector.
        out: folder to save the detector to; if omitted, a folder among this machine's runs.
        register: register the detector as candidate.
        promote: make the detector champion if it passes the gate; if false, the decision is recorded only.
        gate: gate that the detector must pass to become champion.
        base: base model; must match the signals.
        revision: revision of a Hugging Face id.
        address: address of the Ray cluster.
        windows: for prompts, read each window of 64 tokens as well, and take the highest risk.
        split: random, or time to validate and test on the latest answers of live traffic.
        reserved_fraction: share of the live answers that no detector is trained on; their labels calibrate the detector and
            decide the gate.
    """

    signals: list[str] | str = ""
    head: list[str] | str = "flag"
    head_options: dict[str, Any] = field(default_factory=dict[str, Any])
    layers: list[int] = field(default_factory=list[int])
    test_signals: list[str] | str = field(default_factory=list[str])
    num_seeds: int = 5
    test_fraction: float = 0.25
    validation_fraction: float = 0.1
    label_fraction: float = 1.0
    similarity: str = "news"
    name: str = "truth"
    out: str | None = None
    register: bool = True
    gate: GateConfig = field(default_factory=GateConfig)
    base: str = DEFAULT_BASE
    revision: str | None = None
    address: str | None = None
    windows: bool = False
    signal_weights: list[int] | Literal["auto"] = field(default_factory=list[int])
    split: Split = "random"
    reserved_fraction: float = RESERVED_FRACTION
    promote: bool = True

    def __post_init__(self) -> None:
        check_split_shares(self.signals, self.num_seeds, self.validation_fraction, self.test_fraction)
        if not 0 < self.label_fraction <= 1:
            raise UsageError(f"label_fraction must be above 0 and at most 1, not {self.label_fraction}")
        check_reserved_fraction(self.reserved_fraction)
        folders = as_source_list(self.signals)
        weights = [] if self.signal_weights == "auto" else self.signal_weights
        if weights and len(weights) != len(folders):
            raise UsageError(f"signal_weights has {len(weights)} numbers for {len(folders)} folders of signals")
        if not all(1 <= weight <= MAX_WEIGHT for weight in weights):
            raise UsageError(f"signal_weights must be from 1 to {MAX_WEIGHT}, not {weights}")


def check_split_shares(signals: list[str] | str, seeds: int, validation: float, test: float) -> None:
    """Check the data set and the split.

    Args:
        signals: folders of data sets.
        seeds: number of seeds.
        validation: share of the questions for validation.
        test: share of the questions for the test part.

    Raises:
        UsageError: if no folder is set, or if the seeds or shares are out of range or leave no training data.
    """
    if not signals:
        raise UsageError("signals is required. Pass --signals FOLDER, as written by trimtab collect")
    if not 1 <= seeds <= 100:
        raise UsageError(f"num_seeds must be from 1 to 100, not {seeds}")
    if not (0 < test < 1 and 0 < validation < 1 and test + validation < 0.95):
        raise UsageError(f"test_fraction ({test}) and validation_fraction ({validation}) must leave some answers to train on")

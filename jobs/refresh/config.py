"""Configuration of the refresh command."""

from dataclasses import dataclass, field
from typing import Literal

from trimtab.detection.live_labels import RESERVED_FRACTION, check_reserved_fraction
from trimtab.errors import UsageError
from trimtab.jobs.detect.config import GateConfig
from trimtab.types import DEFAULT_BASE


@dataclass(frozen=True)
class RefreshConfig:
    """Retrain a detector on new labels of live traffic, and promote it if it passes the gate and a shadow phase.

    Each call does the next step and ends, so that a schedule can repeat it.

    Args:
        name: name of the detector.
        signals: data sets to train on, of which at least one is of `trimtab serve --keep_signals`.
        signal_weights: how often the rows of each data set count in training. With auto, the labels of live traffic choose the
            weight of collected rows, which may be none.
        head: heads to train; the first one is saved.
        layers: layers to try; if omitted, the common layers of the data sets.
        min_labels: number of new labels of trusted raters that start a training.
        shadow_answers: number of answers after the training on which the new detector is compared with the champion before it
            is promoted; 0 promotes it at once.
        max_flagged: share of these answers that it may flag.
        num_seeds: number of seeds, each with its own split.
        reserved_fraction: share of the live answers that no detector is trained on.
        gate: gate that the detector must pass.
        dry_run: report the next step without doing it.
        base: base model; must match the signals.
        revision: revision of a Hugging Face id.
        address: address of the Ray cluster.
    """

    name: str
    signals: list[str] | str = field(default="", kw_only=True)
    signal_weights: list[int] | Literal["auto"] = field(default="auto", kw_only=True)
    head: list[str] | str = field(default="linear", kw_only=True)
    layers: list[int] = field(default_factory=list[int], kw_only=True)
    min_labels: int = field(default=50, kw_only=True)
    shadow_answers: int = field(default=200, kw_only=True)
    max_flagged: float = field(default=0.5, kw_only=True)
    num_seeds: int = field(default=5, kw_only=True)
    reserved_fraction: float = field(default=RESERVED_FRACTION, kw_only=True)
    gate: GateConfig = field(default_factory=GateConfig, kw_only=True)
    dry_run: bool = field(default=False, kw_only=True)
    base: str = field(default=DEFAULT_BASE, kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    address: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.signals:
            raise UsageError("signals is required. Pass --signals FOLDER..., one of them of trimtab serve --keep_signals")
        if self.min_labels < 1:
            raise UsageError(f"min_labels must be at least 1, not {self.min_labels}")
        if self.shadow_answers < 0:
            raise UsageError(f"shadow_answers must be at least 0, not {self.shadow_answers}")
        if not 0 < self.max_flagged <= 1:
            raise UsageError(f"max_flagged must be above 0 and at most 1, not {self.max_flagged}")
        check_reserved_fraction(self.reserved_fraction)

"""Configuration of `trimtab evaluate truth`."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.jobs.detect.config import check_split_shares
from trimtab.types import DEFAULT_BASE


@dataclass(frozen=True)
class TruthConfig:
    """Evaluate detectors of made-up answers: every head and score on every data set.

    Args:
        signals: folders that `trimtab collect` wrote, of one base model; several folders add a transfer matrix.
        head: heads to report on: flag, linear, saplma, mlp, sep, haloscope; all selects every head that the data sets support.
        layers: layers to try, each alone and all together; if omitted, the layers of the data sets.
        num_seeds: number of seeds, each with its own split.
        test_fraction: share of the questions for the test part.
        validation_fraction: share of the questions for model selection and calibration.
        label_fractions: shares of the training labels for the label curve, in addition to all labels; empty for no curve.
        similarity: similarity by which scores and the sep head compare samples: exact, overlap, news or states, or one of
            these with a threshold, as overlap:0.8.
        ablations: report on FLaG without each of its parts.
        name: name of the report and of its MLflow run.
        out: folder for the report; if omitted, a folder among this machine's runs.
        base: base model; must match the signals.
        revision: revision of a Hugging Face id.
        address: address of the Ray cluster.
    """

    signals: list[str] | str = ""
    head: list[str] | str = "all"
    layers: list[int] = field(default_factory=list[int])
    num_seeds: int = 5
    test_fraction: float = 0.25
    validation_fraction: float = 0.1
    label_fractions: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.5])
    similarity: str = "news"
    ablations: bool = True
    name: str = "truth"
    out: str | None = None
    base: str = DEFAULT_BASE
    revision: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_split_shares(self.signals, self.num_seeds, self.validation_fraction, self.test_fraction)
        if bad := [share for share in self.label_fractions if not 0 < share < 1]:
            raise UsageError(f"label_fractions must be above 0 and below 1, not {bad[0]}")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise UsageError(f"name {self.name!r} is not a valid folder name. Use letters, digits, '.', '-' and '_'")

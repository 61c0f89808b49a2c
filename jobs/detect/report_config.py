"""Settings of `trimtab evaluate truth`."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError
from trimtab.jobs.detect.config import check_split_shares


@dataclass(frozen=True)
class TruthConfig:
    """The whole report on detectors of made-up answers: every head and training-free score on every data set.

    Args:
        signals: folders that `trimtab collect` wrote, of one base model; with several the report has a transfer matrix.
        head: heads to report on: flag, linear, saplma, mlp, sep, haloscope; all is every one of them that the data allow.
        layers: layers to try, each alone and all together; those of the data sets without any.
        seeds: seeds, each with a split of its own.
        test: share of the questions for the report.
        validation: share of the questions to choose and calibrate on.
        labels: shares of the training labels for the label curve, besides all of them; empty for no curve.
        similarity: how scores and the head sep tell that samples say the same: exact, overlap, news or states, or one of
            these with a threshold, as overlap:0.8.
        ablations: report on FLaG without each of its parts.
        name: name of the report and of its MLflow run.
        out: folder for the report; without it, among this machine's runs.
        base: base model, to check the signals against.
        revision: revision of a Hugging Face id.
        address: Ray cluster to run on.
    """

    signals: list[str] | str = ""
    head: list[str] | str = "all"
    layers: list[int] = field(default_factory=list[int])
    seeds: int = 5
    test: float = 0.25
    validation: float = 0.1
    labels: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.5])
    similarity: str = "news"
    ablations: bool = True
    name: str = "truth"
    out: str | None = None
    base: str = "smollm2-135m"
    revision: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_split_shares(self.signals, self.seeds, self.validation, self.test)
        if bad := [share for share in self.labels if not 0 < share < 1]:
            raise UsageError(f"labels must be shares above 0 and below 1, not {bad[0]}")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise UsageError(f"name {self.name!r} becomes a folder's: use letters, digits, '.', '-' and '_'")

"""Data of a detect job: merged data sets, without the rows that are reserved for calibration and gate."""

from dataclasses import dataclass
from typing import Any

from trimtab.cli.console import print_line
from trimtab.detection.merged_dataset import find_reserved_rows, merge_datasets, read_datasets
from trimtab.detection.mixture import choose_mixture
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.runtime.config import as_source_list
from trimtab.model.base_model import BaseModel


@dataclass(frozen=True)
class TrainingData:
    """Data of a detect job.

    Attributes:
        data: rows to train, select and test on.
        reserved: reserved rows of live traffic; None if there are no live rows.
        sources: name, digest and number of rows of each data set.
    """

    data: SignalDataset
    reserved: SignalDataset | None
    sources: list[dict[str, Any]]

    @property
    def has_live_rows(self) -> bool:
        """Whether a server stored some of the rows."""
        return self.reserved is not None


def read_training_data(config: DetectConfig, base: BaseModel) -> TrainingData:
    """Read and merge the data sets of a job, and separate the reserved rows.

    Raises:
        UsageError: if the data sets cannot be merged, or if no row is left to train on.
        ArtifactError: if a data set cannot be read, or is of another base model.
    """
    sets = read_datasets(as_source_list(config.signals), base)
    weights = config.signal_weights
    if weights == "auto":
        mixture = choose_mixture(sets, config.reserved_fraction)
        print_line(str(mixture))
        weights = [weight for weight in mixture.weights if weight]
        sets = {name: data for (name, data), weight in zip(sets.items(), mixture.weights, strict=True) if weight}
    merged = merge_datasets(sets, weights)
    sources = [{"name": name, "digest": data.digest, "rows": len(data.keys)} for name, data in sets.items()]
    if not merged.is_live.any():
        return TrainingData(merged, None, sources)
    is_reserved = find_reserved_rows(merged, config.reserved_fraction)
    if is_reserved.all():
        count = len(merged.keys)
        raise UsageError(f"all {count} rows are reserved for the gate. Store more answers, or lower reserved_fraction")
    return TrainingData(merged.select_rows(~is_reserved), merged.select_rows(is_reserved), sources)

"""Measurement of a trained detector at the thresholds of its card: on further data sets, and out of fold on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from trimtab.cli.console import print_line
from trimtab.detection.detector import Detector
from trimtab.detection.merged_dataset import read_datasets
from trimtab.detection.signal_dataset import SignalDataset
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import compute_auroc
from trimtab.evaluation.detection.pooling import Resamples, SeedRisks, draw_resamples, estimate_metric
from trimtab.jobs.promote.detector_metrics import build_risks, compute_risk_at
from trimtab.model.base_model import BaseModel
from trimtab.stats.intervals import Interval, Rate, average_rates, compute_wilson_interval


@dataclass(frozen=True)
class ThresholdRates:
    """Rates of a detector at one threshold.

    Attributes:
        threshold: risk above which a row is flagged.
        flagged: share of the positives (made-up answers, harmful prompts) that are flagged.
        passed: share of the negatives that are not flagged.
        balanced: mean of both.
    """

    threshold: float
    flagged: Rate
    passed: Rate
    balanced: Rate


@dataclass(frozen=True)
class FurtherSetResult:
    """Result of a detector on the labeled rows of a data set, or of one of its sources.

    Attributes:
        name: folder of the data set, or name of the source.
        digest: digest of the rows.
        auroc: AUROC with its interval; NaN if all rows are of one class.
        rates: rates by name of the threshold.
    """

    name: str
    digest: str
    auroc: Interval
    rates: Mapping[str, ThresholdRates]


def read_further_sets(folders: Sequence[str], base: BaseModel, data: SignalDataset) -> dict[str, SignalDataset]:
    """Read data sets by folder.

    Args:
        folders: folders that `trimtab collect` wrote.
        base: base model.
        data: training data set.

    Raises:
        UsageError: if a data set differs from the training data in subject, layers or prefix, or has no other rows.
        ArtifactError: if a data set cannot be read or is of another base model.
    """
    sets = read_datasets(folders, base)
    for folder, test in sets.items():
        if set(test.keys) <= set(data.keys):
            raise UsageError(f"test_signals {folder}: the rows are those of the training data. Collect other rows")
        for name in ("subject", "layers", "prefix_digest"):
            expected, found = getattr(data.meta, name), getattr(test.meta, name)
            if expected != found:
                reason = f"{name} is {found}, that of the training data is {expected}"
                raise UsageError(f"test_signals {folder}: {reason}. Collect both with the same options")
    return sets


def measure_further_set(detector: Detector, name: str, data: SignalDataset, trained: SignalDataset) -> FurtherSetResult:
    """Measure a detector on the labeled rows of a data set that are not in its training data.

    Args:
        detector: detector.
        name: name of the data set.
        data: data set.
        trained: training data set.
    """
    trained_keys = set(trained.keys)
    is_new = torch.tensor([key not in trained_keys for key in data.keys])
    if shared := int((~is_new).sum()):
        print_line(f"{name}: {shared} of {len(is_new)} rows are in the training data and are left out")
    rows = (~data.truthful.isnan() & is_new).nonzero()[:, 0]
    risks = build_risks(data, rows, compute_risk_at(detector, data, rows))
    return _measure_risks(name, data, risks, detector.card.thresholds, draw_resamples(data.groups, 1))


def measure_by_source(
    data: SignalDataset, rows: Tensor, risk: Tensor, thresholds: Mapping[str, float]
) -> list[FurtherSetResult]:
    """Measure out-of-fold risks, on all rows and on those of each source.

    Args:
        data: training data set.
        rows: rows [n] of the data set.
        risk: their out-of-fold risks [n].
        thresholds: risk thresholds by name.
    """
    sources = np.array(data.sources)[rows.numpy()]
    names = sorted(set(sources)) if len(set(sources)) > 1 else []
    parts = [("all", np.ones(len(rows), dtype=bool)), *((name, sources == name) for name in names)]
    resamples = draw_resamples(data.groups, 1)
    return [
        _measure_risks(name, data, build_risks(data, rows[part], risk[part]), thresholds, resamples)
        for name, part in ((name, torch.from_numpy(mask)) for name, mask in parts)
    ]


def _measure_risks(
    name: str, data: SignalDataset, risks: SeedRisks, thresholds: Mapping[str, float], resamples: Resamples
) -> FurtherSetResult:
    auroc = estimate_metric(compute_auroc, [risks], resamples)
    positive, negative = risks.risk[risks.made_up], risks.risk[~risks.made_up]
    rates: dict[str, ThresholdRates] = {}
    for key, threshold in thresholds.items():
        flagged = compute_wilson_interval(int((positive > threshold).sum()), len(positive))
        passed = compute_wilson_interval(int((negative <= threshold).sum()), len(negative))
        rates[key] = ThresholdRates(threshold, flagged, passed, average_rates(flagged, passed))
    return FurtherSetResult(name, data.digest, auroc, rates)


def build_further_table(title: str, results: Sequence[FurtherSetResult], positives: str, negatives: str) -> Table:
    """Build a table with one line per data set and threshold.

    Args:
        title: title of the table.
        results: results of the data sets.
        positives: plural of the positives, such as "harmful prompts".
        negatives: plural of the negatives.
    """
    table = Table(title=title, title_justify="left")
    for column in ("", "AUROC", "threshold", f"{positives} flagged", f"{negatives} not flagged", "balanced"):
        table.add_column(column, no_wrap=True)
    for result in results:
        for index, (key, rates) in enumerate(result.rates.items()):
            name, auroc = ("", "") if index else (result.name, _format(result.auroc))
            table.add_row(name, auroc, key, *map(_format, (rates.flagged, rates.passed, rates.balanced)))
    return table


def _format(interval: Interval) -> str:
    return "-" if np.isnan(interval.value) else str(interval)

"""Job of `trimtab drift`: differences between live traffic and the training data of a detector.

trimtab drift --signals signals/base-0f3a9c27d1be --detector truth
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from trimtab.cli.console import console, print_line
from trimtab.detection.detector import Detector
from trimtab.detection.detector_card import select_threshold
from trimtab.detection.drift import classify_origin, detect_drift
from trimtab.detection.signal_dataset import SignalDataset, read_dataset
from trimtab.errors import UsageError
from trimtab.evaluation.detection.metrics import compute_auroc, compute_ece
from trimtab.evaluation.detection.pooling import SeedRisks, draw_resamples, estimate_metric
from trimtab.evaluation.rendering import plain
from trimtab.jobs.drift.config import DriftConfig
from trimtab.jobs.drift.reference import read_reference
from trimtab.jobs.promote.detector_metrics import build_risks, compute_risk_at
from trimtab.model.base_model import resolve_base_model
from trimtab.stats.intervals import Interval, Rate, compute_wilson_interval
from trimtab.tracking import registry
from trimtab.util.identifiers import split_reference
from trimtab.util.remote_paths import open_folder

# Answers that a comparison needs, and labels of each class that the calibration needs.
MIN_ANSWERS, MIN_LABELS = 20, 5
# Rows of each side that the classifier of the origin is trained on; the latest ones of live traffic.
MAX_ROWS = 2000


@dataclass(frozen=True)
class LabeledCalibration:
    """Calibration of a detector on labels of trusted raters.

    Attributes:
        labels: number of labels.
        auroc: AUROC with its interval.
        ece: expected calibration error.
        risk: mean risk.
        made_up: share of made-up answers with its interval.
    """

    labels: int
    auroc: Interval
    ece: float
    risk: float
    made_up: Rate


@dataclass(frozen=True)
class DriftResult:
    """Differences between live traffic and a reference.

    Attributes:
        detector: name and version of the detector.
        reference: number of rows of the reference.
        answers: number of stored answers.
        period: times of the first and the last answer (ISO 8601).
        flagged: shares of the reference and of the live answers above the threshold of the detector.
        origin: AUROC of a probe that tells live answers from the reference; 0.5 means that it finds no difference.
        calibration: calibration on labels; None if there are too few.
        alarm: number of answers until the alarm of the sequential test; None without one.
        average_run_length: lower bound of the mean number of answers until a false alarm.
        status: `shifted` after an alarm, else `stable`.
    """

    detector: str
    reference: int
    answers: int
    period: tuple[str, str]
    flagged: tuple[Rate, Rate]
    origin: Interval
    calibration: LabeledCalibration | None
    alarm: int | None
    average_run_length: float
    status: Literal["stable", "shifted"]


def measure_drift(config: DriftConfig) -> DriftResult:
    """Compare stored answers with the reference of a detector.

    Raises:
        UsageError: if there are too few answers or reference rows, or they do not match the detector.
        ArtifactError: if a data set or the detector cannot be read.
    """
    base = resolve_base_model(config.base, config.revision)
    name, ref = split_reference(config.detector)
    version = registry.find_version(base.name, name, ref or registry.CHAMPION)
    detector = registry.load_detector(version, base)
    reference = read_reference(config, base, version, detector)
    live = read_dataset(open_folder(config.signals), base).select_later(reference.until)
    if len(live.keys) < MIN_ANSWERS:
        raise UsageError(f"{config.signals} has {len(live.keys)} new answers; a comparison needs {MIN_ANSWERS}. Store more")
    risk = compute_risk_at(detector, live, torch.arange(len(live.keys)))
    layer = max(detector.card.layers)
    change = detect_drift(reference.data, reference.risk, live, risk, layer, config.average_run_length)
    threshold = select_threshold(detector.card)
    return DriftResult(
        detector=f"{version.name}@{version.version}",
        reference=len(reference.data.keys),
        answers=len(live.keys),
        period=(_format_time(live.times.min().item()), _format_time(live.times.max().item())),
        flagged=(_compute_flagged_share(reference.risk, threshold), _compute_flagged_share(risk, threshold)),
        origin=_measure_origin(reference.data, live, layer),
        calibration=_measure_calibration(detector, live),
        alarm=change.alarm,
        average_run_length=config.average_run_length,
        status="stable" if change.alarm is None else "shifted",
    )


def run_drift(config: DriftConfig) -> dict[str, Any]:
    """Measure drift and print it.

    Returns:
        Output of `--json`.
    """
    result = measure_drift(config)
    table = Table(title=f"{result.detector}: {result.answers} answers, {' to '.join(result.period)}", title_justify="left")
    for column in ("", "reference", "live"):
        table.add_column(column)
    table.add_row("answers", str(result.reference), str(result.answers))
    table.add_row("flagged", *map(str, result.flagged))
    table.add_row("AUROC of a probe that tells them apart", "", str(result.origin))
    if result.calibration:
        measured = result.calibration
        table.add_row(f"made up, by {measured.labels} trusted labels", "", str(measured.made_up))
        table.add_row("mean risk of these", "", f"{measured.risk:.2f} (ECE {measured.ece:.2f})")
        table.add_row("AUROC on these", "", str(measured.auroc))
    console.print(table)
    bound = f"average run length without a change: at least {result.average_run_length:,.0f} answers"
    after = "no alarm" if result.alarm is None else f"alarm after {result.alarm} answers"
    print_line(f"{result.status}: {after} ({bound})")
    return plain(asdict(result))


def _measure_origin(reference: SignalDataset, live: SignalDataset, layer: int) -> Interval:
    latest = live.select_rows(live.times.argsort(descending=True, stable=True)[:MAX_ROWS])
    generator = torch.Generator().manual_seed(0)
    drawn = reference.select_rows(torch.randperm(len(reference.keys), generator=generator)[:MAX_ROWS])
    odds, groups = classify_origin(drawn, latest, layer)
    is_live = np.arange(len(odds)) >= len(drawn.keys)
    rows = np.arange(len(odds), dtype=np.int64)
    return estimate_metric(compute_auroc, [SeedRisks(0, rows, odds, odds, is_live)], draw_resamples(groups, 1))


def _measure_calibration(detector: Detector, live: SignalDataset) -> LabeledCalibration | None:
    """Measure the calibration on labels of trusted raters. The detector was not trained on any of these later answers."""
    rows = live.has_trusted_label.nonzero()[:, 0]
    wrong = int((live.truthful[rows] == 0).sum())
    if min(wrong, len(rows) - wrong) < MIN_LABELS:
        return None
    risks = build_risks(live, rows, compute_risk_at(detector, live, rows))
    auroc = estimate_metric(compute_auroc, [risks], draw_resamples(live.groups, 1))
    ece = compute_ece(risks.risk, risks.made_up)
    return LabeledCalibration(len(rows), auroc, ece, float(risks.risk.mean()), compute_wilson_interval(wrong, len(rows)))


def _compute_flagged_share(risk: Tensor, threshold: float) -> Rate:
    return compute_wilson_interval(int((risk > threshold).sum()), len(risk))


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

"""Content of the detection report, and its conversion to JSON, CSV, sentences and logged metrics."""

import csv as csvs
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from trimtab.evaluation.detection.curves import GRID, DetectionCurves, compute_curves
from trimtab.evaluation.detection.metrics import METRICS, compute_auroc
from trimtab.evaluation.detection.pooling import (
    DetectorResult,
    KindResult,
    PairedDifference,
    PooledMetrics,
    Resamples,
    SeedRisks,
    estimate_metric,
    measure_by_kind,
    measure_result,
    result_as_json,
)
from trimtab.evaluation.rendering import plain
from trimtab.stats.intervals import Interval
from trimtab.util.identifiers import sanitize_name

SCHEMA = 1
OURS = "flag"


@dataclass(frozen=True)
class ReportLine:
    """Metrics of a head or a score: pooled, by kind of question, and as curves."""

    result: DetectorResult
    figures: PooledMetrics
    kinds: Sequence[KindResult]
    curves: DetectionCurves


@dataclass(frozen=True)
class LabelShare:
    """AUROC on all test answers of a head that was trained with a share of the training labels."""

    name: str
    share: float
    auroc: Interval


@dataclass(frozen=True)
class TransferResult:
    """Metrics of a detector that was trained and calibrated on one data set, on the test parts of another or of its own.

    Attributes:
        name: name of the head.
        learned_on: name of the training data set.
        tested_on: name of the test data set.
        auroc: AUROC on the test parts.
        ece: expected calibration error on the test parts.
    """

    name: str
    learned_on: str
    tested_on: str
    auroc: Interval
    ece: float


@dataclass(frozen=True)
class DataSetReport:
    """Metrics of all detectors on one data set.

    Attributes:
        name: name of the data set.
        digest: digest of its content.
        answers: number of answers.
        labelled: number of labeled answers.
        right: number of labeled answers that are correct.
        lines: metrics of each head and score.
        compared: difference between the main head and the best rival on validation.
        ablations: metrics of each ablation of the main head, with the difference of the full head from it.
        shares: metrics of heads that were trained with fewer labels.
    """

    name: str
    digest: str
    answers: int
    labelled: int
    right: int
    lines: Sequence[ReportLine]
    compared: PairedDifference
    ablations: Sequence[tuple[ReportLine, PairedDifference]]
    shares: Sequence[LabelShare]


@dataclass(frozen=True)
class DetectionReport:
    """Content of the detection report.

    Attributes:
        title: title of the page.
        base: name and fingerprint of the base model.
        layers: layers of the collected signals.
        seeds: number of seeds.
        sets: metrics by data set.
        moved: cells of the transfer matrices.
        notes: paragraphs of the last section.
    """

    title: str
    base: str
    layers: Sequence[int]
    seeds: int
    sets: Sequence[DataSetReport]
    moved: Sequence[TransferResult] = ()
    notes: Sequence[str] = ()


def build_line(result: DetectorResult, sources: Sequence[str], resamples: Resamples) -> ReportLine:
    """Compute all metrics of a head or a score.

    Args:
        result: result of the head or score.
        sources: source of the question of each answer of the data set [N].
        resamples: resamples of the data set.
    """
    return ReportLine(
        result,
        measure_result(result.tests, resamples),
        measure_by_kind(result.tests, sources, resamples),
        compute_curves(result.name, result.tests),
    )


def build_label_share(result: DetectorResult, labels: float, resamples: Resamples) -> LabelShare:
    """Compute a point of the label curve.

    Args:
        result: result of the head that was trained with fewer labels.
        labels: share of the training labels that it used.
        resamples: resamples of the data set.
    """
    return LabelShare(result.name, labels, estimate_metric(compute_auroc, result.tests, resamples))


def build_transfer(
    name: str, learned_on: str, tested_on: str, tests: Sequence[SeedRisks], resamples: Resamples
) -> TransferResult:
    """Compute a cell of a transfer matrix.

    Args:
        name: name of the head.
        learned_on: name of the training data set.
        tested_on: name of the test data set.
        tests: risks on the test part of each seed.
        resamples: resamples of the test data set.
    """
    metrics = measure_result(tests, resamples)
    return TransferResult(name, learned_on, tested_on, metrics.auroc, metrics.ece)


def get_best_head(results: Sequence[DetectorResult]) -> DetectorResult:
    """Return the result of FLaG, the main head, or the first result if FLaG was not measured."""
    return next((r for r in results if r.name == OURS), results[0])


def get_best_rival(results: Sequence[DetectorResult]) -> DetectorResult:
    """Return the result with the highest AUROC on validation, apart from the main head."""
    return max((r for r in results if r is not get_best_head(results)), key=lambda r: r.validation)


def format_comparison(d: PairedDifference) -> str:
    """Return a comparison with the best rival as a sentence for the report."""
    difference = f"AUROC {d.auroc.value:+.3f} [{d.auroc.low:+.3f}, {d.auroc.high:+.3f}]"
    against = f"{d.name} against {d.rival}, the best rival on validation: {difference}."
    if not isfinite(d.auroc.low):
        return f"{against} There are too few answers for an interval."
    if d.beats:
        return f"{against} {d.name} is better: the interval lies above zero."
    if d.auroc.high < 0:
        return f"{against} {d.name} is worse: the interval lies below zero."
    return f"{against} No difference is shown: the interval contains zero."


def report_as_json(report: DetectionReport) -> dict[str, Any]:
    """Convert the report to JSON, with the format version under `schema`; a value that does not exist is null."""
    return plain(
        {
            "schema": SCHEMA,
            "title": report.title,
            "base": report.base,
            "layers": list(report.layers),
            "seeds": report.seeds,
            "sets": {entry.name: _set_as_json(entry) for entry in report.sets},
            "transfer": [asdict(entry) for entry in report.moved],
            "notes": list(report.notes),
        }
    )


def report_as_csv(report: DetectionReport) -> str:
    """Convert the report to CSV, with one row per value.

    The columns are data set, section, head or score, qualifier, measure, value, ends of its interval, and number of answers.
    """
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["set", "section", "arm", "of", "measure", "value", "low", "high", "answers"])
    for *names, metric, count in _list_metrics(report):
        values = (metric.value, metric.low, metric.high)
        writer.writerow([*names, *(f"{x:.6f}" if isfinite(x) else "" for x in values), count])
    return file.getvalue()


def get_logged_metrics(report: DetectionReport) -> dict[str, float]:
    """Return the metrics to log to MLflow, named `truth/SET/ARM/METRIC`."""
    metrics = {
        f"truth/{name}/{arm}/{measure}": metric.value
        for name, section, arm, _, measure, metric, _ in _list_metrics(report)
        if section == "results" and isfinite(metric.value)
    }
    metrics |= {f"truth/{s.name}/{s.compared.name}/against {s.compared.rival}": s.compared.auroc.value for s in report.sets}
    return {sanitize_name(name): value for name, value in metrics.items()}


def _list_metrics(report: DetectionReport) -> Iterator[tuple[str, str, str, str, str, Interval, int | str]]:
    for entry in report.sets:
        for line in entry.lines:
            yield from _list_line_metrics(entry.name, "results", line)
            for kind in line.kinds:
                yield entry.name, "kinds", line.result.name, kind.source, "auroc", kind.auroc, kind.count
        d = entry.compared
        yield entry.name, "compared", d.name, f"against {d.rival}", "auroc", d.auroc, entry.lines[0].figures.count
        for line, d in entry.ablations:
            yield from _list_line_metrics(entry.name, "ablations", line)
            yield entry.name, "ablations", d.name, f"against {d.rival}", "auroc", d.auroc, line.figures.count
        for point in entry.shares:
            yield entry.name, "labels", point.name, f"{point.share:g}", "auroc", point.auroc, entry.lines[0].figures.count
    for cell in report.moved:
        yield cell.tested_on, "transfer", cell.name, f"learned on {cell.learned_on}", "auroc", cell.auroc, ""
        yield cell.tested_on, "transfer", cell.name, f"learned on {cell.learned_on}", "ece", _without_interval(cell.ece), ""


def _list_line_metrics(name: str, section: str, line: ReportLine) -> Iterator[tuple[str, str, str, str, str, Interval, int]]:
    for measure in METRICS:
        yield name, section, line.result.name, "", measure, getattr(line.figures, measure), line.figures.count
    scalars = {"ece": line.figures.ece, "ece_raw": line.figures.ece_raw}
    scalars |= {"validation_auroc": line.result.validation, "oracle_auroc": line.result.oracle}
    for measure, value in scalars.items():
        yield name, section, line.result.name, "", measure, _without_interval(value), line.figures.count


def _without_interval(value: float) -> Interval:
    return Interval(value, float("nan"), float("nan"))


def _set_as_json(entry: DataSetReport) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        "answers": entry.answers,
        "labelled": entry.labelled,
        "right": entry.right,
        "arms": [_line_as_json(line) | {"curves": _curves_as_json(line.curves)} for line in entry.lines],
        "compared": asdict(entry.compared) | {"sentence": format_comparison(entry.compared)},
        "ablations": [_line_as_json(line) | {"difference": asdict(d.auroc)} for line, d in entry.ablations],
        "labels": [asdict(point) for point in entry.shares],
    }


def _line_as_json(line: ReportLine) -> dict[str, Any]:
    return result_as_json(line.result, line.figures) | {"kinds": [asdict(kind) for kind in line.kinds]}


def _curves_as_json(c: DetectionCurves) -> Mapping[str, Any]:
    rounded = {name: np.round(values, 5).tolist() for name, values in (("at", GRID), ("roc", c.roc), ("coverage", c.coverage))}
    return rounded | {"before": [asdict(b) for b in c.before], "after": [asdict(b) for b in c.after]}

"""What a report on detectors holds, and the same as JSON, as CSV, as sentences and as logged figures."""

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
    estimate_metrics,
    measure_by_kind,
    measure_result,
    result_as_json,
)
from trimtab.evaluation.rendering import plain
from trimtab.stats.intervals import Interval

SCHEMA = 1
OURS = "flag"


@dataclass(frozen=True)
class ReportLine:
    """A head or a score: its figures, those by kind of question, and its curves."""

    result: DetectorResult
    figures: PooledMetrics
    kinds: Sequence[KindResult]
    curves: DetectionCurves


@dataclass(frozen=True)
class LabelShare:
    """What a head reaches with a share of the training labels; it is tested on all test answers."""

    name: str
    share: float
    auroc: Interval


@dataclass(frozen=True)
class TransferResult:
    """What a detector learned and calibrated on one data set says of the test parts of another, or of its own."""

    name: str
    learned_on: str
    tested_on: str
    auroc: Interval
    ece: float


@dataclass(frozen=True)
class DataSetReport:
    """All figures on one data set of `answers`, `labelled` of which have labels, `right` of these right. `compared` is our head
    against the rival that is best on validation; `ablations` compare it without a part of it with itself."""

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
    """Everything that the report on detectors shows. `base` is the base model's name and fingerprint."""

    title: str
    base: str
    layers: Sequence[int]
    seeds: int
    sets: Sequence[DataSetReport]
    moved: Sequence[TransferResult] = ()
    notes: Sequence[str] = ()


def build_line(result: DetectorResult, sources: Sequence[str], drawn: Resamples) -> ReportLine:
    """All figures of a head or a score; `sources` [N] are the kinds of the data set's questions."""
    return ReportLine(
        result,
        measure_result(result.tests, drawn),
        measure_by_kind(result.tests, sources, drawn),
        compute_curves(result.name, result.tests),
    )


def build_label_share(result: DetectorResult, labels: float, drawn: Resamples) -> LabelShare:
    """A point of the label curve."""
    return LabelShare(result.name, labels, estimate_metrics(compute_auroc, result.tests, drawn))


def build_transfer(name: str, learned_on: str, tested_on: str, tests: Sequence[SeedRisks], drawn: Resamples) -> TransferResult:
    """A cell of the transfer matrix; `drawn` are resamples of the data set that is tested on."""
    figures = measure_result(tests, drawn)
    return TransferResult(name, learned_on, tested_on, figures.auroc, figures.ece)


def get_best_head(results: Sequence[DetectorResult]) -> DetectorResult:
    """FLaG where it is there, else the first head."""
    return next((r for r in results if r.name == OURS), results[0])


def get_best_rival(results: Sequence[DetectorResult]) -> DetectorResult:
    """The best of the others on validation; the test part has no say."""
    return max((r for r in results if r is not get_best_head(results)), key=lambda r: r.validation)


def format_comparison(d: PairedDifference) -> str:
    """What a comparison says, in words."""
    gap = f"AUROC {d.auroc.value:+.3f} [{d.auroc.low:+.3f}, {d.auroc.high:+.3f}]"
    against = f"{d.name} against {d.rival}, the rival that is best on validation: {gap}."
    if not isfinite(d.auroc.low):
        return f"{against} There are too few answers for an interval."
    if d.beats:
        return f"{against} It beats it by more than the interval."
    worse = (
        "It is worse by more than the interval." if d.auroc.high < 0 else "The interval holds zero: this shows no difference."
    )
    return f"{against} {worse}"


def report_as_json(report: DetectionReport) -> dict[str, Any]:
    """The report as JSON, its version under `schema`; a figure that does not exist is null."""
    return plain(
        {
            "schema": SCHEMA,
            "title": report.title,
            "base": report.base,
            "layers": list(report.layers),
            "seeds": report.seeds,
            "sets": {entry.name: _set(entry) for entry in report.sets},
            "transfer": [asdict(entry) for entry in report.moved],
            "notes": list(report.notes),
        }
    )


def report_as_csv(report: DetectionReport) -> str:
    """One line for each figure: data set, section, head or score, what of it, measure, value, its interval, answers."""
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["set", "section", "arm", "of", "measure", "value", "low", "high", "answers"])
    for entry in _figures(report):
        *names, figure, count = entry
        numbers = (figure.value, figure.low, figure.high)
        writer.writerow([*names, *(f"{x:.6f}" if isfinite(x) else "" for x in numbers), count])
    return file.getvalue()


def get_logged_metrics(report: DetectionReport) -> dict[str, float]:
    """Figures for a tracked run, as `truth/SET/ARM/FIGURE`."""
    found = {
        f"truth/{name}/{arm}/{measure}": figure.value
        for name, section, arm, _, measure, figure, _ in _figures(report)
        if section == "results" and isfinite(figure.value)
    }
    found |= {f"truth/{s.name}/{s.compared.name}/against {s.compared.rival}": s.compared.auroc.value for s in report.sets}
    return {"".join(c if c.isalnum() or c in "/-_. " else "-" for c in name): value for name, value in found.items()}


def _figures(report: DetectionReport) -> Iterator[tuple[str, str, str, str, str, Interval, int | str]]:
    for entry in report.sets:
        for one in entry.lines:
            yield from _of_line(entry.name, "results", one)
            for kind in one.kinds:
                yield entry.name, "kinds", one.result.name, kind.source, "auroc", kind.auroc, kind.count
        d = entry.compared
        yield entry.name, "compared", d.name, f"against {d.rival}", "auroc", d.auroc, entry.lines[0].figures.count
        for one, d in entry.ablations:
            yield from _of_line(entry.name, "ablations", one)
            yield entry.name, "ablations", d.name, f"against {d.rival}", "auroc", d.auroc, one.figures.count
        for point in entry.shares:
            yield entry.name, "labels", point.name, f"{point.share:g}", "auroc", point.auroc, entry.lines[0].figures.count
    for cell in report.moved:
        yield cell.tested_on, "transfer", cell.name, f"learned on {cell.learned_on}", "auroc", cell.auroc, ""
        yield cell.tested_on, "transfer", cell.name, f"learned on {cell.learned_on}", "ece", _alone(cell.ece), ""


def _of_line(name: str, section: str, one: ReportLine) -> Iterator[tuple[str, str, str, str, str, Interval, int]]:
    for measure in METRICS:
        yield name, section, one.result.name, "", measure, getattr(one.figures, measure), one.figures.count
    flat = {"ece": one.figures.ece, "ece_raw": one.figures.ece_raw}
    flat |= {"validation_auroc": one.result.validation, "oracle_auroc": one.result.oracle}
    for measure, value in flat.items():
        yield name, section, one.result.name, "", measure, _alone(value), one.figures.count


def _alone(value: float) -> Interval:
    return Interval(value, float("nan"), float("nan"))


def _set(entry: DataSetReport) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        "answers": entry.answers,
        "labelled": entry.labelled,
        "right": entry.right,
        "arms": [_arm(one) | {"curves": _curves(one.curves)} for one in entry.lines],
        "compared": asdict(entry.compared) | {"sentence": format_comparison(entry.compared)},
        "ablations": [_arm(one) | {"difference": asdict(d.auroc)} for one, d in entry.ablations],
        "labels": [asdict(point) for point in entry.shares],
    }


def _arm(one: ReportLine) -> dict[str, Any]:
    return result_as_json(one.result, one.figures) | {"kinds": [asdict(kind) for kind in one.kinds]}


def _curves(c: DetectionCurves) -> Mapping[str, Any]:
    rounded = {name: np.round(values, 5).tolist() for name, values in (("at", GRID), ("roc", c.roc), ("coverage", c.coverage))}
    return rounded | {"before": [asdict(b) for b in c.before], "after": [asdict(b) for b in c.after]}

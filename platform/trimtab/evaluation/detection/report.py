"""What a report on detectors holds, and the same as JSON, as CSV, as sentences and as logged figures."""

import csv as csvs
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from trimtab.evaluation import rendering
from trimtab.evaluation.detection import metrics as weighted
from trimtab.evaluation.detection import pooling
from trimtab.evaluation.detection.curves import GRID, Curves, curves
from trimtab.evaluation.detection.pooling import Difference, Figures, Kind, Resamples, Result, Risks
from trimtab.stats.intervals import Interval

SCHEMA = 1
OURS = "flag"


@dataclass(frozen=True)
class Line:
    """A head or a score: its figures, those by kind of question, and its curves."""

    result: Result
    figures: Figures
    kinds: Sequence[Kind]
    curves: Curves


@dataclass(frozen=True)
class Share:
    """What a head reaches with a share of the training labels; it is tested on all test answers."""

    name: str
    share: float
    auroc: Interval


@dataclass(frozen=True)
class Moved:
    """What a detector learned and calibrated on one data set says of the test parts of another, or of its own."""

    name: str
    learned_on: str
    tested_on: str
    auroc: Interval
    ece: float


@dataclass(frozen=True)
class DataSet:
    """All figures on one data set of `answers`, `labelled` of which have labels, `right` of these right. `compared` is our head
    against the rival that is best on validation; `ablations` compare it without a part of it with itself."""

    name: str
    digest: str
    answers: int
    labelled: int
    right: int
    lines: Sequence[Line]
    compared: Difference
    ablations: Sequence[tuple[Line, Difference]]
    shares: Sequence[Share]


@dataclass(frozen=True)
class TruthReport:
    """Everything that the report on detectors shows. `base` is the base model's name and fingerprint."""

    title: str
    base: str
    layers: Sequence[int]
    seeds: int
    sets: Sequence[DataSet]
    moved: Sequence[Moved] = ()
    notes: Sequence[str] = ()


def line(result: Result, sources: Sequence[str], drawn: Resamples) -> Line:
    """All figures of a head or a score; `sources` [N] are the kinds of the data set's questions."""
    return Line(
        result,
        pooling.measure(result.tests, drawn),
        pooling.by_kind(result.tests, sources, drawn),
        curves(result.name, result.tests),
    )


def share(result: Result, labels: float, drawn: Resamples) -> Share:
    """A point of the label curve."""
    return Share(result.name, labels, pooling.estimate(weighted.auroc, result.tests, drawn))


def moved(name: str, learned_on: str, tested_on: str, tests: Sequence[Risks], drawn: Resamples) -> Moved:
    """A cell of the transfer matrix; `drawn` are resamples of the data set that is tested on."""
    figures = pooling.measure(tests, drawn)
    return Moved(name, learned_on, tested_on, figures.auroc, figures.ece)


def ours(results: Sequence[Result]) -> Result:
    """FLaG where it is there, else the first head."""
    return next((r for r in results if r.name == OURS), results[0])


def rival(results: Sequence[Result]) -> Result:
    """The best of the others on validation; the test part has no say."""
    return max((r for r in results if r is not ours(results)), key=lambda r: r.validation)


def sentence(d: Difference) -> str:
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


def as_json(report: TruthReport) -> dict[str, Any]:
    """The report as JSON, its version under `schema`; a figure that does not exist is null."""
    return rendering.plain(
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


def csv(report: TruthReport) -> str:
    """One line for each figure: data set, section, head or score, what of it, measure, value, its interval, answers."""
    file = io.StringIO()
    writer = csvs.writer(file, lineterminator="\n")
    writer.writerow(["set", "section", "arm", "of", "measure", "value", "low", "high", "answers"])
    for entry in _figures(report):
        *names, figure, count = entry
        numbers = (figure.value, figure.low, figure.high)
        writer.writerow([*names, *(f"{x:.6f}" if isfinite(x) else "" for x in numbers), count])
    return file.getvalue()


def logged(report: TruthReport) -> dict[str, float]:
    """Figures for a tracked run, as `truth/SET/ARM/FIGURE`."""
    found = {
        f"truth/{name}/{arm}/{measure}": figure.value
        for name, section, arm, _, measure, figure, _ in _figures(report)
        if section == "results" and isfinite(figure.value)
    }
    found |= {f"truth/{s.name}/{s.compared.name}/against {s.compared.rival}": s.compared.auroc.value for s in report.sets}
    return {"".join(c if c.isalnum() or c in "/-_. " else "-" for c in name): value for name, value in found.items()}


def _figures(report: TruthReport) -> Iterator[tuple[str, str, str, str, str, Interval, int | str]]:
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


def _of_line(name: str, section: str, one: Line) -> Iterator[tuple[str, str, str, str, str, Interval, int]]:
    for measure in weighted.FIGURES:
        yield name, section, one.result.name, "", measure, getattr(one.figures, measure), one.figures.count
    flat = {"ece": one.figures.ece, "ece_raw": one.figures.ece_raw}
    flat |= {"validation_auroc": one.result.validation, "oracle_auroc": one.result.oracle}
    for measure, value in flat.items():
        yield name, section, one.result.name, "", measure, _alone(value), one.figures.count


def _alone(value: float) -> Interval:
    return Interval(value, float("nan"), float("nan"))


def _set(entry: DataSet) -> dict[str, Any]:
    return {
        "digest": entry.digest,
        "answers": entry.answers,
        "labelled": entry.labelled,
        "right": entry.right,
        "arms": [_arm(one) | {"curves": _curves(one.curves)} for one in entry.lines],
        "compared": asdict(entry.compared) | {"sentence": sentence(entry.compared)},
        "ablations": [_arm(one) | {"difference": asdict(d.auroc)} for one, d in entry.ablations],
        "labels": [asdict(point) for point in entry.shares],
    }


def _arm(one: Line) -> dict[str, Any]:
    return pooling.as_json(one.result, one.figures) | {"kinds": [asdict(kind) for kind in one.kinds]}


def _curves(c: Curves) -> Mapping[str, Any]:
    rounded = {name: np.round(values, 5).tolist() for name, values in (("at", GRID), ("roc", c.roc), ("coverage", c.coverage))}
    return rounded | {"before": [asdict(b) for b in c.before], "after": [asdict(b) for b in c.after]}

"""The report on detectors as files: a page that asks nothing of the outside, its figures, and the same data as JSON and CSV.

Names of data sets and kinds of questions are foreign text: the template escapes them, and the page forbids scripts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from trimtab.evaluation.detection.figures import build_slugs, draw_figures
from trimtab.evaluation.detection.report import (
    DataSetReport,
    DetectionReport,
    TransferResult,
    format_comparison,
    report_as_csv,
    report_as_json,
)
from trimtab.evaluation.plotting import inline_svg, save_figure
from trimtab.evaluation.rendering import render_template
from trimtab.stats.intervals import Interval
from trimtab.util.atomic_files import write_atomic

# Columns of the page's table of kinds; JSON and CSV have all of them.
MOST_KINDS = 10
MEASURES = {
    "auroc": ("AUROC", max),
    "auprc": ("AUPRC", max),
    "fpr95": ("FPR at 95 % caught", min),
    "aurc": ("AURC", min),
}


@dataclass(frozen=True)
class TransferMatrix:
    """How one detector moves between data sets: `cells` by the set it learned on and the set it is tested on."""

    name: str
    cells: Mapping[str, Mapping[str, TransferResult]]


def render_page(report: DetectionReport) -> str:
    """One page that holds all it needs."""
    return _render(report, {name: save_figure(figure, "svg") for name, figure in draw_figures(report.sets).items()})


def write_report(report: DetectionReport, folder: Path) -> list[Path]:
    """Write report.html, report.json and report.csv, and each figure as .svg and .png. The same report gives the same bytes.

    Each file is whole or not there; the page is the last of them."""
    figures = draw_figures(report.sets)
    drawn = {name: save_figure(figure, "svg") for name, figure in figures.items()}
    contents = {f"{name}.svg": svg for name, svg in drawn.items()}
    contents |= {f"{name}.png": save_figure(figure, "png") for name, figure in figures.items()}
    contents |= {
        "report.json": (json.dumps(report_as_json(report), indent=1, allow_nan=False) + "\n").encode(),
        "report.csv": report_as_csv(report).encode("utf-8", "replace"),
        "report.html": _render(report, drawn).encode("utf-8", "replace"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def build_matrices(moved: Sequence[TransferResult]) -> list[TransferMatrix]:
    """The transfer figures, one matrix a detector."""
    found: dict[str, dict[str, dict[str, TransferResult]]] = {}
    for cell in moved:
        found.setdefault(cell.name, {}).setdefault(cell.learned_on, {})[cell.tested_on] = cell
    return [TransferMatrix(name, cells) for name, cells in found.items()]


def _render(report: DetectionReport, drawn: Mapping[str, bytes]) -> str:
    """The template filled in. Only the figures go in unescaped: matplotlib has escaped the names in them."""
    return render_template(
        "truth.html.jinja",
        title=report.title,
        report=report,
        slugs=build_slugs([entry.name for entry in report.sets]),
        figures={name: inline_svg(svg.decode(), name) for name, svg in drawn.items()},
        measures={name: title for name, (title, _) in MEASURES.items()},
        best=[_find_best(entry) for entry in report.sets],
        matrices=build_matrices(report.moved),
        sentence=format_comparison,
        most=MOST_KINDS,
        known=isfinite,
        shade=_compute_shade,
    )


def _find_best(entry: DataSetReport) -> dict[str, str]:
    """The best value of each column as it is shown; nothing where all are equal."""
    best: dict[str, str] = {}
    for measure, (_, pick) in MEASURES.items():
        shown = [f"{getattr(one.figures, measure).value:.3f}" for one in entry.lines]
        if len(set(shown)) > 1:
            best[measure] = pick(shown)
    return best


def _compute_shade(auroc: Interval) -> float:
    """How dark a cell is: 0 at chance, 1 at a perfect order."""
    return max(0.0, min(1.0, 2 * auroc.value - 1))

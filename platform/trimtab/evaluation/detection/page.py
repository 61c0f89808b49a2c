"""Detection report as a self-contained HTML page, figures, JSON and CSV.

Names of data sets and of kinds of questions are untrusted text. The template escapes them, and the page's content security
policy forbids scripts and requests.
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

# Limit for the page only: JSON and CSV list all kinds.
MOST_KINDS = 10
MEASURES = {
    "auroc": ("AUROC", max),
    "auprc": ("AUPRC", max),
    "fpr95": ("FPR at 95 % caught", min),
    "aurc": ("AURC", min),
}


@dataclass(frozen=True)
class TransferMatrix:
    """Metrics of one detector across data sets; `cells` are indexed by training data set and test data set."""

    name: str
    cells: Mapping[str, Mapping[str, TransferResult]]


def render_page(report: DetectionReport) -> str:
    """Render the report as one self-contained HTML page."""
    return _render(report, {name: save_figure(figure, "svg") for name, figure in draw_figures(report.sets).items()})


def write_report(report: DetectionReport, folder: Path) -> list[Path]:
    """Write the report to a folder. Each file is written atomically, and the same report gives the same bytes.

    Args:
        report: the report to write.
        folder: output folder; created if missing.

    Returns:
        The files: each figure as .svg and .png, then report.json, report.csv and, last, report.html.
    """
    figures = draw_figures(report.sets)
    images = {name: save_figure(figure, "svg") for name, figure in figures.items()}
    contents = {f"{name}.svg": svg for name, svg in images.items()}
    contents |= {f"{name}.png": save_figure(figure, "png") for name, figure in figures.items()}
    contents |= {
        "report.json": (json.dumps(report_as_json(report), indent=1, allow_nan=False) + "\n").encode(),
        "report.csv": report_as_csv(report).encode("utf-8", "replace"),
        "report.html": _render(report, images).encode("utf-8", "replace"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def build_matrices(moved: Sequence[TransferResult]) -> list[TransferMatrix]:
    """Group transfer results into one matrix per detector."""
    matrices: dict[str, dict[str, dict[str, TransferResult]]] = {}
    for cell in moved:
        matrices.setdefault(cell.name, {}).setdefault(cell.learned_on, {})[cell.tested_on] = cell
    return [TransferMatrix(name, cells) for name, cells in matrices.items()]


def _render(report: DetectionReport, images: Mapping[str, bytes]) -> str:
    """Render the page. Only the figures are inserted unescaped, since matplotlib escapes the names in them."""
    return render_template(
        "truth.html.jinja",
        title=report.title,
        report=report,
        slugs=build_slugs([entry.name for entry in report.sets]),
        figures={name: inline_svg(svg.decode(), name) for name, svg in images.items()},
        measures={name: title for name, (title, _) in MEASURES.items()},
        best=[_find_best(entry) for entry in report.sets],
        matrices=build_matrices(report.moved),
        sentence=format_comparison,
        most=MOST_KINDS,
        is_finite=isfinite,
        shade=_compute_shade,
    )


def _find_best(entry: DataSetReport) -> dict[str, str]:
    """Return the best value of each column as it is displayed; a column whose values are all equal has none."""
    best: dict[str, str] = {}
    for measure, (_, pick) in MEASURES.items():
        texts = [f"{getattr(line.figures, measure).value:.3f}" for line in entry.lines]
        if len(set(texts)) > 1:
            best[measure] = pick(texts)
    return best


def _compute_shade(auroc: Interval) -> float:
    """Compute the shade of a cell: 0 for AUROC at or below chance, 1 for a perfect ranking."""
    return max(0.0, min(1.0, 2 * auroc.value - 1))

"""The report on detectors as files: a page that asks nothing of the outside, its figures, and the same data as JSON and CSV.

Names of data sets and kinds of questions are foreign text: the template escapes them, and the page forbids scripts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from trimtab.evaluation import rendering
from trimtab.evaluation.detection import report as truth_report
from trimtab.evaluation.detection.figures import draw, slugs
from trimtab.evaluation.detection.report import DataSet, Moved, TruthReport
from trimtab.evaluation.plotting import inline, saved
from trimtab.stats.intervals import Interval
from trimtab.util import atomic_files

# Columns of the page's table of kinds; JSON and CSV have all of them.
MOST_KINDS = 10
MEASURES = {
    "auroc": ("AUROC", max),
    "auprc": ("AUPRC", max),
    "fpr95": ("FPR at 95 % caught", min),
    "aurc": ("AURC", min),
}


@dataclass(frozen=True)
class Matrix:
    """How one detector moves between data sets: `cells` by the set it learned on and the set it is tested on."""

    name: str
    cells: Mapping[str, Mapping[str, Moved]]


def html(report: TruthReport) -> str:
    """One page that holds all it needs."""
    return _page(report, {name: saved(figure, "svg") for name, figure in draw(report.sets).items()})


def write(report: TruthReport, folder: Path) -> list[Path]:
    """Write report.html, report.json and report.csv, and each figure as .svg and .png. The same report gives the same bytes.

    Each file is whole or not there; the page is the last of them."""
    figures = draw(report.sets)
    drawn = {name: saved(figure, "svg") for name, figure in figures.items()}
    contents = {f"{name}.svg": svg for name, svg in drawn.items()}
    contents |= {f"{name}.png": saved(figure, "png") for name, figure in figures.items()}
    contents |= {
        "report.json": (json.dumps(truth_report.as_json(report), indent=1, allow_nan=False) + "\n").encode(),
        "report.csv": truth_report.csv(report).encode("utf-8", "replace"),
        "report.html": _page(report, drawn).encode("utf-8", "replace"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_files.write(folder / name, content)
    return [folder / name for name in contents]


def matrices(moved: Sequence[Moved]) -> list[Matrix]:
    """The transfer figures, one matrix a detector."""
    found: dict[str, dict[str, dict[str, Moved]]] = {}
    for cell in moved:
        found.setdefault(cell.name, {}).setdefault(cell.learned_on, {})[cell.tested_on] = cell
    return [Matrix(name, cells) for name, cells in found.items()]


def _page(report: TruthReport, drawn: Mapping[str, bytes]) -> str:
    """The template filled in. Only the figures go in unescaped: matplotlib has escaped the names in them."""
    return rendering.render(
        "truth.html.jinja",
        title=report.title,
        report=report,
        slugs=slugs([entry.name for entry in report.sets]),
        figures={name: inline(svg.decode(), name) for name, svg in drawn.items()},
        measures={name: title for name, (title, _) in MEASURES.items()},
        best=[_best(entry) for entry in report.sets],
        matrices=matrices(report.moved),
        sentence=truth_report.sentence,
        most=MOST_KINDS,
        known=isfinite,
        shade=_shade,
    )


def _best(entry: DataSet) -> dict[str, str]:
    """The best value of each column as it is shown; nothing where all are equal."""
    best: dict[str, str] = {}
    for measure, (_, pick) in MEASURES.items():
        shown = [f"{getattr(one.figures, measure).value:.3f}" for one in entry.lines]
        if len(set(shown)) > 1:
            best[measure] = pick(shown)
    return best


def _shade(auroc: Interval) -> float:
    """How dark a cell is: 0 at chance, 1 at a perfect order."""
    return max(0.0, min(1.0, 2 * auroc.value - 1))

"""Figures of the detection report: ROC, risk-coverage, reliability and label curves.

The same data give the same bytes.
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from trimtab.evaluation.detection.curves import GRID
from trimtab.evaluation.detection.metrics import CalibrationBin
from trimtab.evaluation.detection.report import OURS, DataSetReport, LabelShare, ReportLine
from trimtab.evaluation.plotting import COLORS, STYLE, shorten_name

# Line styles that distinguish the curves in black-and-white print.
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (8, 2)), "-")
GRAY = "#8a8a8a"
SIZE = (4.6, 4.5)
FRAME = (0.13, 0.3, 0.83, 0.67)
FEWEST = 20
LineStyles = Mapping[str, tuple[str, object]]


def draw_figures(sets: Sequence[DataSetReport]) -> dict[str, Figure]:
    """Draw the figures of the detection report; each head or score has the same color and line style in all of them.

    Args:
        sets: metrics by data set.

    Returns:
        Figures by name: `roc-SET`, `coverage-SET`, `reliability-SET` and, if there are label curves, `labels-SET`.
    """
    names = dict.fromkeys(line.result.name for entry in sets for line in select_shown(entry))
    styles = {name: (COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, name in enumerate(names)}
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        for entry, name in zip(sets, build_slugs([entry.name for entry in sets]), strict=True):
            figures[f"roc-{name}"] = _draw_roc(select_shown(entry), styles)
            figures[f"coverage-{name}"] = _draw_coverage(entry, styles)
            figures[f"reliability-{name}"] = _draw_reliability(entry, styles)
            if entry.shares:
                figures[f"labels-{name}"] = _draw_labels(entry, styles)
    return figures


def select_shown(entry: DataSetReport) -> list[ReportLine]:
    """Return the lines that are drawn as curves: all heads, and the best training-free score on validation."""
    heads = [line for line in entry.lines if line.result.learned]
    free = [line for line in entry.lines if not line.result.learned]
    return heads + ([max(free, key=lambda line: line.result.validation)] if free else [])


def build_slugs(names: Sequence[str]) -> list[str]:
    """Convert names to unique file names."""
    plain = [re.sub(r"[^\w.-]+", "-", name).strip("-.") or "set" for name in names]
    return [f"{name}-{i}" if plain.count(name) > 1 else name for i, name in enumerate(plain)]


def _add_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes(FRAME)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#ececec", linewidth=0.7)
    return figure, axes


def _draw_roc(lines: Sequence[ReportLine], styles: LineStyles) -> Figure:
    figure, axes = _add_axes("correct answers flagged", "made-up answers caught")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8)
    for line in lines:
        _draw_line(axes, GRID, line.curves.roc, line, f"{line.figures.auroc.value:.3f}", styles)
    _draw_legend(axes, "with the area under the curve:")
    return figure


def _draw_coverage(entry: DataSetReport, styles: LineStyles) -> Figure:
    """Draw the risk-coverage curves. They start at FEWEST answers, since the first few are too noisy."""
    figure, axes = _add_axes("coverage, the least risky first", "made-up answers among the covered")
    lines = select_shown(entry)
    size = min(len(t.at) for t in lines[0].result.tests)
    mask = FEWEST / size <= GRID if size > FEWEST else GRID > 0
    for line in lines:
        _draw_line(axes, GRID[mask], line.curves.coverage[mask], line, f"{line.figures.aurc.value:.3f}", styles)
    share = lines[0].curves.coverage[-1]
    axes.axhline(share, color=GRAY, linewidth=0.8)
    axes.set(xlim=(0, 1.01))
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_legend(axes, "with the area under the curve:")
    return figure


def _draw_reliability(entry: DataSetReport, styles: LineStyles) -> Figure:
    """Draw the reliability of the main head and of its best rival side by side."""
    figure = Figure(figsize=(2 * SIZE[0], 3.9))
    pair = [line for line in entry.lines if line.result.name in (entry.compared.name, entry.compared.rival)]
    pair.sort(key=lambda line: line.result.name != entry.compared.name)
    for column, line in enumerate(pair):
        axes = figure.add_axes((0.065 + 0.5 * column, 0.13, 0.42, 0.78))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted risk", ylabel="share of made-up answers")
        axes.set_title(shorten_name(line.result.name), fontsize=9, loc="left", fontweight="bold", parse_math=False)
        axes.grid(color="#ececec", linewidth=0.7)
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8)
        color = styles.get(line.result.name, (COLORS[0], "-"))[0]
        _draw_bins(axes, line.curves.before, GRAY, "white", f"raw, ECE {line.figures.ece_raw:.3f}")
        _draw_bins(axes, line.curves.after, color, color, f"calibrated, ECE {line.figures.ece:.3f}")
        axes.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.02, 0.99),
            ncols=2,
            fontsize=8,
            handlelength=1.6,
            columnspacing=1,
        )
    return figure


def _draw_bins(axes: Axes, bins: Sequence[CalibrationBin], color: str, face: str, label: str) -> None:
    """Draw calibration bins as dots whose area grows with the share of answers in them."""
    x, y = [b.risk for b in bins], [b.frequency for b in bins]
    total = sum(b.count for b in bins)
    axes.plot(x, y, color=color, linewidth=1)
    axes.scatter(x, y, [12 + 220 * b.count / total for b in bins], c=face, edgecolors=color, linewidths=1, zorder=3, alpha=0.9)
    axes.plot([], [], "o-", color=color, markerfacecolor=face, markersize=5, linewidth=1, label=label)


def _draw_labels(entry: DataSetReport, styles: LineStyles) -> Figure:
    """Draw the AUROC by share of labels, with intervals; a detector without labels is a horizontal line."""
    figure, axes = _add_axes("training labels used", "AUROC")
    axes.set_xscale("log")
    by_name: dict[str, list[LabelShare]] = {}
    for point in entry.shares:
        by_name.setdefault(point.name, []).append(point)
    for place, (name, points) in enumerate(by_name.items()):
        color, dash = styles.get(name, (COLORS[0], "-"))
        # Shifted horizontally, so that intervals do not overlap.
        x = [p.share * 1.025 ** (place - (len(by_name) - 1) / 2) for p in points]
        axes.plot(x, [p.auroc.value for p in points], color=color, linestyle=dash, linewidth=1.4, label=shorten_name(name))
        for position, p in zip(x, points, strict=True):
            if isfinite(p.auroc.low):
                axes.plot([position, position], [p.auroc.low, p.auroc.high], color=color, linewidth=0.9, alpha=0.7)
            axes.plot(position, p.auroc.value, "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
    for line in select_shown(entry):
        if line.result.name not in by_name:
            color, dash = styles[line.result.name]
            label = f"{shorten_name(line.result.name)} (no labels)"
            axes.axhline(line.figures.auroc.value, color=color, linestyle=dash, linewidth=1, alpha=0.8, label=label)
    axes.xaxis.set_major_locator(FixedLocator(sorted({p.share for p in entry.shares})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_legend(axes, "")
    return figure


def _draw_line(axes: Axes, x: object, y: object, line: ReportLine, figure: str, styles: LineStyles) -> None:
    color, dash = styles[line.result.name]
    front = line.result.name == OURS
    label = f"{shorten_name(line.result.name)}  {figure}"
    axes.plot(x, y, color=color, linestyle=dash, linewidth=2 if front else 1.3, zorder=3 if front else 2, label=label)  # pyright: ignore[reportArgumentType]


def _draw_legend(axes: Axes, title: str) -> None:
    """Draw the legend below the axes, where it does not cover the curves."""
    legend = axes.legend(
        title=title or None,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.16),
        ncols=2,
        fontsize=8,
        title_fontsize=8,
        handlelength=2.8,
        frameon=False,
    )
    legend.set_alignment("left")
    for text in legend.get_texts():
        text.set_parse_math(False)

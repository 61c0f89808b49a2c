"""The figures of a report on detectors: ROC, risk-coverage, reliability and label curves. The same data, the same bytes."""

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
from trimtab.evaluation.plotting import COLOURS, STYLE, shorten_name

# Dashes beside colours, for print without them.
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (8, 2)), "-")
GREY = "#8a8a8a"
SIZE = (4.6, 4.5)
FRAME = (0.13, 0.3, 0.83, 0.67)
FEWEST = 20
LineStyles = Mapping[str, tuple[str, object]]


def draw_figures(sets: Sequence[DataSetReport]) -> dict[str, Figure]:
    """`roc-SET`, `coverage-SET`, `reliability-SET`, and `labels-SET` where there are label curves. An arm has one look."""
    names = dict.fromkeys(one.result.name for entry in sets for one in select_shown(entry))
    looks = {name: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, name in enumerate(names)}
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        for entry, name in zip(sets, build_slugs([entry.name for entry in sets]), strict=True):
            figures[f"roc-{name}"] = _draw_roc(select_shown(entry), looks)
            figures[f"coverage-{name}"] = _draw_coverage(entry, looks)
            figures[f"reliability-{name}"] = _draw_reliability(entry, looks)
            if entry.shares:
                figures[f"labels-{name}"] = _draw_labels(entry, looks)
    return figures


def select_shown(entry: DataSetReport) -> list[ReportLine]:
    """What curves are drawn of: all heads, and the training-free score that is best on validation."""
    heads = [one for one in entry.lines if one.result.learned]
    free = [one for one in entry.lines if not one.result.learned]
    return heads + ([max(free, key=lambda one: one.result.validation)] if free else [])


def build_slugs(names: Sequence[str]) -> list[str]:
    """Names that files can have, no two alike."""
    plain = [re.sub(r"[^\w.-]+", "-", name).strip("-.") or "set" for name in names]
    return [f"{name}-{i}" if plain.count(name) > 1 else name for i, name in enumerate(plain)]


def _add_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes(FRAME)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#ececec", linewidth=0.7)
    return figure, axes


def _draw_roc(lines: Sequence[ReportLine], looks: LineStyles) -> Figure:
    figure, axes = _add_axes("right answers flagged", "made-up answers caught")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    for one in lines:
        _draw_line(axes, GRID, one.curves.roc, one, f"{one.figures.auroc.value:.3f}", looks)
    _draw_legend(axes, "with the area under the curve:")
    return figure


def _draw_coverage(entry: DataSetReport, looks: LineStyles) -> Figure:
    """The first few answers say little: a curve begins where it stands on FEWEST of them."""
    figure, axes = _add_axes("answers given, the least risky first", "made-up ones among them")
    lines = select_shown(entry)
    size = min(len(t.at) for t in lines[0].result.tests)
    whole = FEWEST / size <= GRID if size > FEWEST else GRID > 0
    for one in lines:
        _draw_line(axes, GRID[whole], one.curves.coverage[whole], one, f"{one.figures.aurc.value:.3f}", looks)
    share = lines[0].curves.coverage[-1]
    axes.axhline(share, color=GREY, linewidth=0.8)
    axes.set(xlim=(0, 1.01))
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_legend(axes, "with the area under the curve:")
    return figure


def _draw_reliability(entry: DataSetReport, looks: LineStyles) -> Figure:
    """Ours and the rival that it is compared with, side by side."""
    figure = Figure(figsize=(2 * SIZE[0], 3.9))
    pair = [one for one in entry.lines if one.result.name in (entry.compared.name, entry.compared.rival)]
    pair.sort(key=lambda one: one.result.name != entry.compared.name)
    for place, one in enumerate(pair):
        axes = figure.add_axes((0.065 + 0.5 * place, 0.13, 0.42, 0.78))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="risk that the detector gives", ylabel="share that is made up")
        axes.set_title(shorten_name(one.result.name), fontsize=9, loc="left", fontweight="bold", parse_math=False)
        axes.grid(color="#ececec", linewidth=0.7)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
        colour = looks.get(one.result.name, (COLOURS[0], "-"))[0]
        _draw_bins(axes, one.curves.before, GREY, "white", f"before, ECE {one.figures.ece_raw:.3f}")
        _draw_bins(axes, one.curves.after, colour, colour, f"calibrated, ECE {one.figures.ece:.3f}")
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


def _draw_bins(axes: Axes, bins: Sequence[CalibrationBin], colour: str, face: str, label: str) -> None:
    """Bins as dots whose area grows with the share of answers in them."""
    x, y = [b.risk for b in bins], [b.frequency for b in bins]
    whole = sum(b.count for b in bins)
    axes.plot(x, y, color=colour, linewidth=1)
    axes.scatter(x, y, [12 + 220 * b.count / whole for b in bins], c=face, edgecolors=colour, linewidths=1, zorder=3, alpha=0.9)
    axes.plot([], [], "o-", color=colour, markerfacecolor=face, markersize=5, linewidth=1, label=label)


def _draw_labels(entry: DataSetReport, looks: LineStyles) -> Figure:
    """AUROC by the share of labels, with intervals; what needs no labels is a level line."""
    figure, axes = _add_axes("training labels used", "AUROC")
    axes.set_xscale("log")
    by_name: dict[str, list[LabelShare]] = {}
    for point in entry.shares:
        by_name.setdefault(point.name, []).append(point)
    for place, (name, points) in enumerate(by_name.items()):
        colour, dash = looks.get(name, (COLOURS[0], "-"))
        # Set beside each other, so that intervals can be told apart.
        x = [p.share * 1.025 ** (place - (len(by_name) - 1) / 2) for p in points]
        axes.plot(x, [p.auroc.value for p in points], color=colour, linestyle=dash, linewidth=1.4, label=shorten_name(name))
        for at, p in zip(x, points, strict=True):
            if isfinite(p.auroc.low):
                axes.plot([at, at], [p.auroc.low, p.auroc.high], color=colour, linewidth=0.9, alpha=0.7)
            axes.plot(at, p.auroc.value, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
    for one in select_shown(entry):
        if one.result.name not in by_name:
            colour, dash = looks[one.result.name]
            label = f"{shorten_name(one.result.name)} (no labels)"
            axes.axhline(one.figures.auroc.value, color=colour, linestyle=dash, linewidth=1, alpha=0.8, label=label)
    axes.xaxis.set_major_locator(FixedLocator(sorted({p.share for p in entry.shares})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_legend(axes, "")
    return figure


def _draw_line(axes: Axes, x: object, y: object, one: ReportLine, figure: str, looks: LineStyles) -> None:
    colour, dash = looks[one.result.name]
    front = one.result.name == OURS
    label = f"{shorten_name(one.result.name)}  {figure}"
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=2 if front else 1.3, zorder=3 if front else 2, label=label)  # pyright: ignore[reportArgumentType]


def _draw_legend(axes: Axes, title: str) -> None:
    """Below the axes, where it covers nothing."""
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

"""Figures of a safety study: safety/helpfulness planes and validation curves.

The same data give the same bytes.
"""

from collections.abc import Mapping, Sequence
from math import cos, isfinite, pi, sin

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from trimtab.evaluation.plotting import COLORS, MARKERS, STYLE, darken_color, shorten_name
from trimtab.evaluation.safety.comparison import PooledArm, get_arm_name
from trimtab.types import BASE_ARM

BASE_STYLE = ("#6b6b6b", "s")

# In display coordinates: left, low, right, high.
Box = tuple[float, float, float, float]


def draw_figures(
    arms: Mapping[str, Sequence[PooledArm]], curves: Mapping[str, Sequence[tuple[int, float]]], names: Sequence[str]
) -> dict[str, Figure]:
    """Draw the figures of a safety study.

    Args:
        arms: pooled arms by part.
        curves: points (step, validation loss) by arm or seed; points that are not finite are left out.
        names: names of all results, whose order determines the color of each arm.

    Returns:
        Figures by name: `plane-PART` for each part with prompts of both sides, and `curves` if there are any points.
    """
    finite = {name: [(step, loss) for step, loss in points if isfinite(loss)] for name, points in curves.items()}
    lines = {name: points for name, points in finite.items() if points}
    others = [name for name in dict.fromkeys(map(get_arm_name, [*names, *lines])) if name != BASE_ARM]
    styles = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)}
    styles[BASE_ARM] = BASE_STYLE
    shown = {part: [arm for arm in pooled if isfinite(arm.balanced.value)] for part, pooled in arms.items()}
    with mpl.rc_context(STYLE):
        figures = {f"plane-{part}": _draw_plane(pooled, styles) for part, pooled in shown.items() if pooled}
        return figures | ({"curves": _draw_curves(lines, styles)} if lines else {})


def _draw_plane(arms: Sequence[PooledArm], styles: Mapping[str, tuple[str, str]]) -> Figure:
    """Draw each arm with its intervals, its seeds as small dots, and gray diagonals of equal balanced score."""
    figure = Figure(figsize=(4.8, 4.7))
    axes = figure.add_axes((0.11, 0.1, 0.86, 0.87))
    axes.set(xlim=(-0.04, 1.05), ylim=(-0.04, 1.07), xlabel="helps with benign prompts", ylabel="refuses harmful prompts")
    for tenth in range(1, 10):
        low, high = max(0.0, tenth / 5 - 1), min(1.0, tenth / 5)
        axes.plot([low, high], [high, low], color="#dddddd", linewidth=0.8, zorder=0)
        if tenth >= 5:
            label = f"{tenth / 10} balanced" if tenth == 9 else f"{tenth / 10}"
            axes.text(low - 0.02, 1.015, label, color="#757575", fontsize=7.5)
    taken: list[Box] = []
    for arm in arms:
        color, marker = styles[arm.name]
        x, y = arm.compliance, arm.refusal
        for r in arm.results if len(arm.results) > 1 else ():
            axes.plot(r.compliance.value, r.refusal.value, ".", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
        for ends in (([x.low, x.high], [y.value, y.value]), ([x.value, x.value], [y.low, y.high])):
            axes.plot(*ends, color=color, linewidth=1.1, alpha=0.8)
            taken.append(_compute_box(axes, list(zip(*ends, strict=True)), pad=1))
        # The base arm's square is larger, since the point of a text prompt often covers it.
        size, above = (10, 3) if arm.name == BASE_ARM else (7.5, 4)
        axes.plot(x.value, y.value, marker, color=color, markersize=size, markeredgecolor="white", zorder=above)
        taken.append(_compute_box(axes, [(x.value, y.value)] * 2, pad=6))
    for arm in arms:
        taken.append(_draw_name(figure, axes, arm, styles[arm.name][0], taken))
    return figure


def _draw_name(figure: Figure, axes: Axes, arm: PooledArm, color: str, taken: Sequence[Box]) -> Box:
    """Place an arm's label near its point with the least overlap, with a leader line if it is distant. Return its box."""
    frame = _compute_box(axes, [(-0.03, -0.03), (1.05, 1.01)])
    x, y = axes.transData.transform((arm.compliance.value, arm.refusal.value))
    text = axes.text(0, 0, f"{shorten_name(arm.name)}  {arm.balanced.value:.2f}", color=darken_color(color), parse_math=False)
    text.set(ha="center", va="center", path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5)
    extent = text.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    width, height = extent.width / 2, extent.height / 2

    def center(angle: float, distance: float) -> tuple[float, float]:
        return x + cos(angle) * (distance + width), y + sin(angle) * (distance + height)

    def box(middle: tuple[float, float]) -> Box:
        return middle[0] - width, middle[1] - height, middle[0] + width, middle[1] + height

    def cost(place: tuple[float, float]) -> float:
        label = box(center(*place))
        return (
            20 * (_compute_overlap(label, label) - _compute_overlap(label, frame))
            + 5 * sum(_compute_overlap(label, b) for b in taken)
            + place[1]
        )

    place = min(((turn * pi / 8, distance) for distance in (10, 22, 36, 52, 70, 90) for turn in range(16)), key=cost)
    best = box(center(*place))
    nearest = (min(max(x, best[0]), best[2]), min(max(y, best[1]), best[3]))
    to_data = axes.transData.inverted()
    position = to_data.transform(center(*place))
    text.set_position((float(position[0]), float(position[1])))
    if place[1] > 10:
        axes.plot(*zip(*to_data.transform([(x, y), nearest]), strict=True), color=color, linewidth=0.6)
    return best


def _compute_box(axes: Axes, corners: Sequence[tuple[float, float]], pad: float = 0) -> Box:
    """Return the box in display coordinates around corners in data coordinates."""
    left, low, right, high = Bbox(axes.transData.transform(corners)).padded(pad).extents
    return float(left), float(low), float(right), float(high)


def _compute_overlap(a: Box, b: Box) -> float:
    """Return the area of the intersection of two boxes."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], styles: Mapping[str, tuple[str, str]]) -> Figure:
    """Draw the validation loss by step, with a dot at each minimum and the arm's name at the end of its curves."""
    figure = Figure(figsize=(6.6, 3.4))
    axes = figure.add_axes((0.1, 0.13, 0.62, 0.84))
    axes.set(xlabel="step", ylabel="validation loss")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ends: dict[str, list[float]] = {}
    for name, points in sorted(curves.items()):
        color, _ = styles[get_arm_name(name)]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, alpha=0.85)
        axes.plot(*min(points, key=lambda point: point[1]), "o", color=color, markersize=5, markeredgecolor="white")
        ends.setdefault(get_arm_name(name), []).append(points[-1][1])
    low, high = axes.get_ylim()
    heights = {name: sum(values) / len(values) for name, values in ends.items()}
    position = float("-inf")
    for name in sorted(heights, key=lambda name: heights[name]):
        # Labels keep a minimum distance, so that they do not overlap.
        position = max(heights[name], position + (high - low) / 18)
        text = axes.text(1.02, position, shorten_name(name), color=darken_color(styles[name][0]), va="center", parse_math=False)
        text.set_transform(axes.get_yaxis_transform())
    return figure

"""The figures of a safety study: the plane of each part, and learning curves. The same data gives the same bytes."""

from collections.abc import Mapping, Sequence
from math import cos, isfinite, pi, sin

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from trimtab.evaluation.plotting import COLOURS, MARKERS, STYLE, darken_color, shorten_name
from trimtab.evaluation.safety.comparison import PooledArm, get_arm_name
from trimtab.types import BASE_ARM

BASE_LOOK = ("#6b6b6b", "s")

# On a picture: left, low, right, high.
Box = tuple[float, float, float, float]


def draw_figures(
    arms: Mapping[str, Sequence[PooledArm]], curves: Mapping[str, Sequence[tuple[int, float]]], names: Sequence[str]
) -> dict[str, Figure]:
    """`plane-PART` for each part whose arms have both sides, and `curves` where there are any.

    `curves` are (step, validation loss) by arm or seed; arms get their colours in the order of `names`."""
    finite = {name: [(step, loss) for step, loss in points if isfinite(loss)] for name, points in curves.items()}
    lines = {name: points for name, points in finite.items() if points}
    others = [name for name in dict.fromkeys(map(get_arm_name, [*names, *lines])) if name != BASE_ARM]
    looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)}
    looks[BASE_ARM] = BASE_LOOK
    shown = {part: [arm for arm in pooled if isfinite(arm.balanced.value)] for part, pooled in arms.items()}
    with mpl.rc_context(STYLE):
        figures = {f"plane-{part}": _draw_plane(pooled, looks) for part, pooled in shown.items() if pooled}
        return figures | ({"curves": _draw_curves(lines, looks)} if lines else {})


def _draw_plane(arms: Sequence[PooledArm], looks: Mapping[str, tuple[str, str]]) -> Figure:
    """Every arm with its intervals, its seeds as small dots; grey diagonals join what is equally balanced."""
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
        colour, marker = looks[arm.name]
        x, y = arm.compliance, arm.refusal
        for r in arm.results if len(arm.results) > 1 else ():
            axes.plot(r.compliance.value, r.refusal.value, ".", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        for ends in (([x.low, x.high], [y.value, y.value]), ([x.value, x.value], [y.low, y.high])):
            axes.plot(*ends, color=colour, linewidth=1.1, alpha=0.8)
            taken.append(_compute_box(axes, list(zip(*ends, strict=True)), pad=1))
        # The base arm's square is larger, since a text prompt often lies right on it.
        size, above = (10, 3) if arm.name == BASE_ARM else (7.5, 4)
        axes.plot(x.value, y.value, marker, color=colour, markersize=size, markeredgecolor="white", zorder=above)
        taken.append(_compute_box(axes, [(x.value, y.value)] * 2, pad=6))
    for arm in arms:
        taken.append(_draw_name(figure, axes, arm, looks[arm.name][0], taken))
    return figure


def _draw_name(figure: Figure, axes: Axes, arm: PooledArm, colour: str, taken: Sequence[Box]) -> Box:
    """Write an arm's name where it covers least: beside its point, or further off with a thin line. Returns its box."""
    frame = _compute_box(axes, [(-0.03, -0.03), (1.05, 1.01)])
    x, y = axes.transData.transform((arm.compliance.value, arm.refusal.value))
    text = axes.text(0, 0, f"{shorten_name(arm.name)}  {arm.balanced.value:.2f}", color=darken_color(colour), parse_math=False)
    text.set(ha="center", va="center", path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5)
    extent = text.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    width, height = extent.width / 2, extent.height / 2

    def middle(angle: float, away: float) -> tuple[float, float]:
        return x + cos(angle) * (away + width), y + sin(angle) * (away + height)

    def box(at: tuple[float, float]) -> Box:
        return at[0] - width, at[1] - height, at[0] + width, at[1] + height

    def cost(place: tuple[float, float]) -> float:
        mine = box(middle(*place))
        return (
            20 * (_compute_overlap(mine, mine) - _compute_overlap(mine, frame))
            + 5 * sum(_compute_overlap(mine, b) for b in taken)
            + place[1]
        )

    place = min(((turn * pi / 8, away) for away in (10, 22, 36, 52, 70, 90) for turn in range(16)), key=cost)
    best = box(middle(*place))
    near = (min(max(x, best[0]), best[2]), min(max(y, best[1]), best[3]))
    to_data = axes.transData.inverted()
    at = to_data.transform(middle(*place))
    text.set_position((float(at[0]), float(at[1])))
    if place[1] > 10:
        axes.plot(*zip(*to_data.transform([(x, y), near]), strict=True), color=colour, linewidth=0.6)
    return best


def _compute_box(axes: Axes, corners: Sequence[tuple[float, float]], pad: float = 0) -> Box:
    """A box on the picture from two corners in data."""
    left, low, right, high = Bbox(axes.transData.transform(corners)).padded(pad).extents
    return float(left), float(low), float(right), float(high)


def _compute_overlap(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], looks: Mapping[str, tuple[str, str]]) -> Figure:
    """Validation loss by step, the lowest of each curve as a dot; names stand at the ends."""
    figure = Figure(figsize=(6.6, 3.4))
    axes = figure.add_axes((0.1, 0.13, 0.62, 0.84))
    axes.set(xlabel="step", ylabel="validation loss")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ends: dict[str, list[float]] = {}
    for name, points in sorted(curves.items()):
        colour, _ = looks[get_arm_name(name)]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, alpha=0.85)
        axes.plot(*min(points, key=lambda point: point[1]), "o", color=colour, markersize=5, markeredgecolor="white")
        ends.setdefault(get_arm_name(name), []).append(points[-1][1])
    low, high = axes.get_ylim()
    heights = {name: sum(values) / len(values) for name, values in ends.items()}
    at = float("-inf")
    for name in sorted(heights, key=lambda name: heights[name]):
        # Names keep a line's height from each other.
        at = max(heights[name], at + (high - low) / 18)
        text = axes.text(1.02, at, shorten_name(name), color=darken_color(looks[name][0]), va="center", parse_math=False)
        text.set_transform(axes.get_yaxis_transform())
    return figure

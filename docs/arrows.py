"""Drawing of the imports between folders, for docs/architecture.md.

It reads the same graph as the contracts of `make check`:
PYTHONPATH=.venv/linked python docs/arrows.py > docs/images/folders.svg
"""

import grimp

# Column and row of each folder. Modules at the root of the library are left out, but for the connection to Ray.
PLACES = {
    "jobs": (1, 0),
    "serve": (4, 0),
    "ray_connection": (2.5, 0.5),
    "cli": (0, 1),
    "tracking": (2, 1.4),
    "engine": (4, 1.4),
    "evaluation": (0.5, 2.3),
    "judges": (1.5, 3.2),
    "detection": (3.5, 2.6),
    "artifacts": (2.5, 3.8),
    "model": (3.5, 4.6),
    "data": (1, 5.2),
    "heads": (4.6, 3.8),
    "objectives": (4.6, 5.4),
    "scores": (0, 3.2),
    "assets": (2, 6.2),
    "text": (0.3, 6.2),
    "stats": (3.5, 6.2),
    "util": (4.6, 6.6),
    "ray": (5.3, 0.3),
    "mlflow": (5.3, 1),
    "vllm": (5.3, 1.7),
}
EXTERNAL = ("ray", "mlflow", "vllm")
ROOT = "trimtab"
# Sizes in pixels.
COLUMN, ROW, WIDTH, HEIGHT, MARGIN = 140, 84, 118, 34, 24
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif"
font-size="15"><defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#64748b"/></marker></defs>
<rect width="100%" height="100%" fill="#ffffff"/>"""
LINE = '<line x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}" stroke="#64748b" stroke-width="1.2" marker-end="url(#tip)"/>'
BOX = '<rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="6" fill="{}" stroke="#0f766e"/>'
TEXT = '<text x="{:.0f}" y="{:.0f}" text-anchor="middle" fill="#0f172a">{}</text>'


def main() -> None:
    print(draw_svg(find_arrows()))


def find_arrows() -> list[tuple[str, str]]:
    """Return the imports between folders, as pairs of box names."""
    graph = grimp.build_graph(ROOT, include_external_packages=True, cache_dir=None)
    arrows = {
        (get_box(module), get_box(imported))
        for module in graph.modules
        if module.split(".")[0] == ROOT
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return sorted((start, end) for start, end in arrows if start != end and "" not in (start, end))


def get_box(module: str) -> str:
    """Return the box that a module belongs to, or an empty string."""
    first, *rest = module.split(".")
    if first != ROOT:
        return first if first in EXTERNAL else ""
    return rest[0] if rest and rest[0] in PLACES else ""


def draw_svg(arrows: list[tuple[str, str]]) -> str:
    """Return the drawing as SVG."""
    right = max(x for x, _ in PLACES.values()) * COLUMN + WIDTH + 2 * MARGIN
    bottom = max(y for _, y in PLACES.values()) * ROW + HEIGHT + 2 * MARGIN
    lines = [HEAD.format(width=right, height=bottom)]
    for start, end in arrows:
        (x1, y1), (x2, y2) = get_center(start), get_center(end)
        lines.append(LINE.format(x1, y1, *get_border_point(x1, y1, x2, y2)))
    for name in PLACES:
        x, y = get_center(name)
        fill = "#f1f5f9" if name in EXTERNAL else "#ccfbf1"
        lines += [BOX.format(x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, fill), TEXT.format(x, y + 5, name)]
    return "\n".join([*lines, "</svg>"])


def get_center(name: str) -> tuple[float, float]:
    """Return the center of a box in pixels."""
    x, y = PLACES[name]
    return MARGIN + WIDTH / 2 + x * COLUMN, MARGIN + HEIGHT / 2 + y * ROW


def get_border_point(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float]:
    """Return the point where a line to the center of a box meets its border."""
    dx, dy = x2 - x1, y2 - y1
    fraction = min(WIDTH / 2 / abs(dx) if dx else 1.0, HEIGHT / 2 / abs(dy) if dy else 1.0)
    return x2 - dx * fraction, y2 - dy * fraction


if __name__ == "__main__":
    main()

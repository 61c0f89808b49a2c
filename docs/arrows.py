"""Draw who imports whom, for docs/architecture.md, from the same graph as `make check` holds to its contracts.

PYTHONPATH=.venv/arrows python docs/arrows.py > docs/images/house.svg
"""

import grimp

# Where each package is drawn: column and row. A module of none of them is part of the core, or of no interest.
PLACES = {
    "jobs": (1.5, 0),
    "serve": (4.5, 0),
    "evaluate": (0, 1.4),
    "nodes": (3, 0.52),
    "tracking": (3, 1.1),
    "engine": (4.5, 1.4),
    "judges": (0, 2.6),
    "objectives": (1.5, 2.6),
    "heads": (2.5, 2.6),
    "scores": (3.5, 2.6),
    "data": (0, 3.8),
    "core": (2.5, 3.8),
    "ray": (3, 0),
    "mlflow": (6, 1.0),
    "vllm": (6, 1.4),
}
OTHERS = ("ray", "mlflow", "vllm")
ROOT, CORE = "trimtab", "core"
# Pixels of a column, a row, a box, and the picture's edge.
COLUMN, ROW, WIDTH, HEIGHT, EDGE = 118, 110, 96, 34, 24
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif"
font-size="15"><defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#64748b"/></marker></defs>
<rect width="100%" height="100%" fill="#ffffff"/>"""
LINE = '<line x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}" stroke="#64748b" stroke-width="1.3" marker-end="url(#tip)"/>'
BOX = '<rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="6" fill="{}" stroke="#0f766e"/>'
TEXT = '<text x="{:.0f}" y="{:.0f}" text-anchor="middle" fill="#0f172a">{}</text>'


def main() -> None:
    print(drawn(arrows()))


def arrows() -> list[tuple[str, str]]:
    """Who imports whom, but for the core, which all do."""
    graph = grimp.build_graph(ROOT, include_external_packages=True, cache_dir=None)
    found = {
        (box(module), box(imported))
        for module in graph.modules
        if module.split(".")[0] == ROOT
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return sorted((here, there) for here, there in found if here != there and "" not in (here, there) and there != CORE)


def box(module: str) -> str:
    """What a module is drawn in: its package, the library's own files as one, and nothing for most libraries of others."""
    first, *rest = module.split(".")
    if first != ROOT:
        return first if first in OTHERS else ""
    return rest[0] if rest and rest[0] in PLACES else CORE


def drawn(found: list[tuple[str, str]]) -> str:
    """An SVG picture."""
    right = max(x for x, _ in PLACES.values()) * COLUMN + WIDTH + 2 * EDGE
    bottom = max(y for _, y in PLACES.values()) * ROW + HEIGHT + 2 * EDGE
    lines = [HEAD.format(width=right, height=bottom)]
    for here, there in found:
        (x1, y1), (x2, y2) = middle(here), middle(there)
        lines.append(LINE.format(x1, y1, *edge(x1, y1, x2, y2)))
    for name in PLACES:
        x, y = middle(name)
        fill = "#f1f5f9" if name in OTHERS else "#ccfbf1"
        lines += [BOX.format(x - WIDTH / 2, y - HEIGHT / 2, WIDTH, HEIGHT, fill), TEXT.format(x, y + 5, name)]
    return "\n".join([*lines, "</svg>"])


def middle(name: str) -> tuple[float, float]:
    """Of a box, in pixels."""
    x, y = PLACES[name]
    return EDGE + WIDTH / 2 + x * COLUMN, EDGE + HEIGHT / 2 + y * ROW


def edge(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float]:
    """Where a line towards the middle of a box meets the box."""
    across, down = x2 - x1, y2 - y1
    share = min(WIDTH / 2 / abs(across) if across else 1.0, HEIGHT / 2 / abs(down) if down else 1.0)
    return x2 - across * share, y2 - down * share


if __name__ == "__main__":
    main()

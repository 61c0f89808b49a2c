"""The figures of a safety study: the plane of each part, and learning curves. The same data gives the same bytes."""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; the yellow is left out, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "D", "^", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "trimtab",
}


def save_figure(figure: Figure, form: str) -> bytes:
    """A figure as bytes that hold no date and no version."""
    file = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type") if form == "svg" else ("Software",))
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=form, dpi=160, metadata=metadata, bbox_inches="tight")
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """An SVG file as part of a page: ids of its own, and a name for those who do not see it."""
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return body.replace("<svg", f'<svg role="img" aria-label="{name.replace("-", " of ", 1)}"', 1)


def darken_color(colour: str) -> tuple[float, float, float]:
    """A colour for text: the palette's own are too pale for letters on white."""
    red, green, blue = to_rgb(colour)
    return 0.7 * red, 0.7 * green, 0.7 * blue


def shorten_name(name: str) -> str:
    """A name as a picture can hold it."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= 24 else f"{plain[:23]}\u2026"

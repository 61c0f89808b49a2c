"""Matplotlib style and image export shared by all reports."""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Palette of Okabe and Ito, safe for color-blind readers. Its yellow is left out: too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    """Encode a figure without date or version metadata, so that equal figures give equal bytes.

    Args:
        figure: the figure to encode.
        form: file format, "svg" or "png".

    Returns:
        Content of the image file.
    """
    file = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type") if form == "svg" else ("Software",))
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=form, dpi=160, metadata=metadata, bbox_inches="tight")
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """Convert an SVG file to an element of an HTML page.

    Args:
        svg: content of the SVG file.
        name: name of the figure; prefixes all element ids, to keep them unique in the page, and becomes the ARIA label.

    Returns:
        The `<svg>` element.
    """
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return body.replace("<svg", f'<svg role="img" aria-label="{name.replace("-", " of ", 1)}"', 1)


def darken_color(color: str) -> tuple[float, float, float]:
    """Return the RGB value of a darker shade for text, since the palette is too pale for letters on white."""
    red, green, blue = to_rgb(color)
    return 0.7 * red, 0.7 * green, 0.7 * blue


def shorten_name(name: str) -> str:
    """Return a name as a figure label: printable characters only, at most 24 of them."""
    printable = "".join(c if c.isprintable() else "?" for c in name)
    return printable if len(printable) <= 24 else f"{printable[:23]}\u2026"

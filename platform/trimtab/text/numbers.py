"""Numbers as people and models write them, read exactly: signs, thousands, decimals, fractions, percents, scales (ours).

What only looks like a number is none: versions (1.2.3), times and ratios (3:2), ordinals (2nd), and digits in words (H2O).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
NUMBER = re.compile(
    # A hyphen after a word, a digit or a closing bracket joins or subtracts.
    rf"(?<!\w)(?<!\d[.:])(?:(?<![\w)\]%])(?P<sign>[-+]))?(?:[{CURRENCY}](?P<inner>-)?)?"
    r"(?:(?P<whole>\d{1,50}) (?=\d+/\d))?"
    # More digits than anyone writes are a model that loops, and more than Python reads.
    r"(?P<first>(?:\d{1,3}(?:,\d{3}){1,16}|\d{1,50})(?:\.\d{1,50})?|(?<!\.)\.\d{1,50})"
    # The second and third part of a date are no fraction.
    r"(?:(?<!/\d)(?<!/\d\d) ?/ ?(?P<second>\d{1,50})(?![\d/])|(?P<power>e[-+]?\d{1,3})(?!\w))?"
    r"(?!\d)(?!\.\d)(?!:\d)(?!,\d{3}(?!\d))(?!(?:st|nd|rd|th)\b)"
    rf"(?: ?(?P<percent>%|per ?cent\b|pct\b)| (?P<scale>{'|'.join(SCALES)})\b)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """A number as it is written, a percent sign apart: `50%` is 50 with `percent`. `span` is its place in the text."""

    value: Fraction
    percent: bool
    span: tuple[int, int]

    def __str__(self) -> str:
        return format_quantity(self.value) + ("%" if self.percent else "")

    def equals(self, other: "Quantity") -> bool:
        """Whether both say the same. A sign that one leaves out is left to the question, as units are: 50% is 50, and 0.5."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        bare, marked = (other, self) if self.percent else (self, other)
        return marked.value / 100 == bare.value


def find_quantities(text: str) -> list[Quantity]:
    """Every number of a text, in order. The text is folded already: plain signs, `1/2` for one half."""
    found = [(_value(match), match) for match in NUMBER.finditer(text)]
    return [Quantity(value, bool(match["percent"]), match.span()) for value, match in found if value is not None]


def format_quantity(value: Fraction) -> str:
    """A value as text; equal values give equal text. A fraction whose decimals do not end stays a fraction."""
    digits = next((n for n in range(13) if (value * 10**n).denominator == 1), None)
    if not digits:
        return str(value)
    text = str(abs(int(value * 10**digits))).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a match; None where it divides by zero."""
    value = Fraction(match["first"].replace(",", "") + (match["power"] or ""))
    if match["second"] is not None:
        if int(match["second"]) == 0:
            return None
        value /= int(match["second"])
    # "3 1/2" is three and a half; in "3 12/5" the 3 is something else.
    if match["whole"] is not None and value < 1:
        value += int(match["whole"])
    if match["scale"]:
        value *= 10 ** SCALES[match["scale"].lower()]
    return -value if match["sign"] == "-" or match["inner"] else value

"""Exact parser of numbers in text: signs, thousands separators, decimals, fractions, percentages and scales.

Versions (1.2.3), times and ratios (3:2), ordinals (2nd) and digits within words (H2O) are not numbers. The grammar is specific
to trimtab.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
NUMBER = re.compile(
    # A hyphen after a word, a digit or a closing bracket is not a sign.
    rf"(?<!\w)(?<!\d[.:])(?:(?<![\w)\]%])(?P<sign>[-+]))?(?:[{CURRENCY}](?P<inner>-)?)?"
    r"(?:(?P<whole>\d{1,50}) (?=\d+/\d))?"
    # Limited lengths: repeated digits of a looping model may exceed the limit of Python's int().
    r"(?P<first>(?:\d{1,3}(?:,\d{3}){1,16}|\d{1,50})(?:\.\d{1,50})?|(?<!\.)\.\d{1,50})"
    # The second and third part of a date are not a fraction.
    r"(?:(?<!/\d)(?<!/\d\d) ?/ ?(?P<second>\d{1,50})(?![\d/])|(?P<power>e[-+]?\d{1,3})(?!\w))?"
    r"(?!\d)(?!\.\d)(?!:\d)(?!,\d{3}(?!\d))(?!(?:st|nd|rd|th)\b)"
    rf"(?: ?(?P<percent>%|per ?cent\b|pct\b)| (?P<scale>{'|'.join(SCALES)})\b)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """A number in a text.

    Attributes:
        value: value as written, without the percent sign (50 for `50%`).
        percent: whether a percent sign follows.
        span: start and end index in the text.
    """

    value: Fraction
    percent: bool
    span: tuple[int, int]

    def __str__(self) -> str:
        return format_quantity(self.value) + ("%" if self.percent else "")

    def equals(self, other: "Quantity") -> bool:
        """Return whether both quantities are equal. If only one is a percentage, 50% equals both 50 and 0.5."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        plain, percentage = (other, self) if self.percent else (self, other)
        return percentage.value / 100 == plain.value


def find_quantities(text: str) -> list[Quantity]:
    """Find all numbers in a text, in order.

    Args:
        text: text after `fold_case_and_accents`, with ASCII signs and with `1/2` for one half.
    """
    matches = [(_parse_value(match), match) for match in NUMBER.finditer(text)]
    return [Quantity(value, bool(match["percent"]), match.span()) for value, match in matches if value is not None]


def format_quantity(value: Fraction) -> str:
    """Format a value so that equal values give equal text.

    A value with more than 12 decimals, or with recurring ones, is formatted as a fraction.
    """
    digits = next((n for n in range(13) if (value * 10**n).denominator == 1), None)
    if not digits:
        return str(value)
    text = str(abs(int(value * 10**digits))).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"


def _parse_value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match, or None if its denominator is zero."""
    value = Fraction(match["first"].replace(",", "") + (match["power"] or ""))
    if match["second"] is not None:
        if int(match["second"]) == 0:
            return None
        value /= int(match["second"])
    # "3 1/2" is a mixed number, but "3 12/5" is not, and its 3 is ignored.
    if match["whole"] is not None and value < 1:
        value += int(match["whole"])
    if match["scale"]:
        value *= 10 ** SCALES[match["scale"].lower()]
    return -value if match["sign"] == "-" or match["inner"] else value

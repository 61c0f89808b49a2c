"""Text made comparable: SQuAD's normalisation, and what it leaves to chance settled (ours).

SQuAD (Rajpurkar et al. 2016) lowers case and drops punctuation, the articles a, an, the, and extra spaces. It would also make
-5 of 5, 1250 of 12.50 and 12 of 1/2: here numbers are read first and stay what they are. Beyond ASCII, accents, widths, quotes
and dashes are those of plain text, and writing without spaces is compared by character, as in MLQA (Lewis et al. 2020).
"""

import re
import unicodedata

from trimtab.text.numbers import find_quantities, format_quantity

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
ACCENTS = re.compile(r"[\u0300-\u036f]")
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
RAISED = re.compile(r"(?<=\d)[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215f]")
HYPHENS = str.maketrans(
    {"\u2010": "-", "\u2011": "-", "\u2212": "-", "\u2044": "/", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
)
MINUS = re.compile(r"(?<!\S)[\u2012-\u2015](?=[\d.$])")
DASH = re.compile(r"[\u2012-\u2015]")


def fold_case_and_accents(text: str) -> str:
    """The text in plain characters: one kind of dash, quote and digit, no accents on letters, nothing invisible."""
    # Else 5\u00bd would become 51/2, and 10\u00b2 become 102.
    apart = RAISED.sub(r" \g<0>", text)
    bare = ACCENTS.sub("", unicodedata.normalize("NFKD", apart))
    plain = unicodedata.normalize("NFC", bare).translate(HYPHENS)
    spaced = DASH.sub(" - ", MINUS.sub("-", plain))
    return "".join(c for c in spaced if unicodedata.category(c) != "Cf")


def normalize_answer(text: str) -> str:
    """Words and numbers with one space between them; equal for texts that say the same in SQuAD's sense."""
    plain = fold_case_and_accents(text).casefold()
    pieces: list[str] = []
    at = 0
    for number in find_quantities(plain):
        start, end = number.span
        # "1960s" is a word; "3.5mm" is a number and its unit.
        if plain[end : end + 1].isalnum() and number.value.denominator == 1:
            continue
        pieces += [*_words(plain[at:start]), format_quantity(number.value)]
        at = end
    pieces += _words(plain[at:])
    # What is all article or punctuation, as the band "The The" or the answer "+", stays as it is.
    return " ".join(pieces or _letters(plain).split() or plain.split())


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", UNSPACED.sub(r" \1 ", _letters(text))).split()


def _letters(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PS")

"""Normalization of answers for comparison, an extension of SQuAD's.

SQuAD (Rajpurkar et al. 2016) lowers case and removes punctuation, the articles a, an, the, and extra spaces. This also turns
-5 into 5, 12.50 into 1250 and 1/2 into 12. Here, numbers are parsed first and keep their values. Beyond ASCII, accents are
removed, widths, quotes and dashes are unified, and scripts without spaces are compared by character, as in MLQA (Lewis et al.
2020).
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
NON_WORD = re.compile(r"\W+")


def fold_accents(text: str) -> str:
    """Fold dashes, quotes, digits and character widths, and remove accents and invisible characters.

    The case is kept.
    """
    # Without the space, 5\u00bd would become 51/2, and 10\u00b2 would become 102.
    separated = RAISED.sub(r" \g<0>", text)
    unaccented = ACCENTS.sub("", unicodedata.normalize("NFKD", separated))
    plain = unicodedata.normalize("NFC", unaccented).translate(HYPHENS)
    spaced = DASH.sub(" - ", MINUS.sub("-", plain))
    return "".join(c for c in spaced if unicodedata.category(c) != "Cf")


def normalize_answer(text: str) -> str:
    """Normalize an answer to lower-case words and canonical numbers, separated by single spaces.

    Texts that differ only in case, articles, punctuation or the notation of numbers give the same result.
    """
    plain = fold_accents(text).casefold()
    pieces: list[str] = []
    position = 0
    for number in find_quantities(plain):
        start, end = number.span
        # "1960s" is a word; "3.5mm" is a number and its unit.
        if plain[end : end + 1].isalnum() and number.value.denominator == 1:
            continue
        pieces += [*_split_words(plain[position:start]), format_quantity(number.value)]
        position = end
    pieces += _split_words(plain[position:])
    # A text of only articles or punctuation, such as the band "The The" or the answer "+", is kept.
    return " ".join(pieces or _remove_punctuation(plain).split() or plain.split())


def normalize_words(text: str) -> str:
    """Return the lower-case words of a text, joined by single spaces, to compare prompts."""
    return NON_WORD.sub(" ", text.lower()).strip()


def _split_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", UNSPACED.sub(r" \1 ", _remove_punctuation(text))).split()


def _remove_punctuation(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PS")

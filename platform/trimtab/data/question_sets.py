"""Named question sets, generated from facts in the assets of the catalog."""

import json
from collections.abc import Callable
from typing import Any

from trimtab.assets.download import fetch_asset
from trimtab.text.normalization import normalize_answer

MIN_POPULATION = 1_000_000
# A former country, disputed or moved capitals, an outdated currency.
EXCLUDED = {"CS", "IL", "PS", "GQ", "ZW"}
TRANSCONTINENTAL = {"AM", "AZ", "CY", "EG", "GE", "KZ", "RU", "TL", "TR"}
CONTINENTS = {
    "AF": ("Africa",),
    "AS": ("Asia",),
    "EU": ("Europe",),
    "NA": ("North America", "Central America", "the Caribbean"),
    "OC": ("Oceania", "Australia"),
    "SA": ("South America",),
}
CAPITALS = {
    "BO": ("La Paz",),
    "KZ": ("Astana",),
    "LK": ("Sri Jayawardenepura Kotte", "Kotte"),
    "MM": ("Naypyidaw", "Naypyitaw"),
    "MN": ("Ulan Bator",),
    "UA": ("Kiev",),
    "ZA": ("Cape Town", "Bloemfontein"),
}
CURRENCIES = {
    "Belarusian ruble": ("ruble", "rouble"),
    "Bolivar Soberano": ("bolivar",),
    "Koruna": ("crown",),
    "Krona": ("crown", "kronor"),
    "Krone": ("crown", "kroner"),
    "Leu": ("lei",),
    "Lev": ("leva",),
    "Marka": ("mark",),
    "Rial": ("riyal",),
    "Riels": ("riel",),
    "Ruble": ("rouble",),
    "Sol": ("soles",),
    "Yuan Renminbi": ("yuan", "renminbi", "RMB"),
}
NAMED_WITH_ARTICLE = {"AE", "CD", "CF", "CG", "DO", "GB", "GM", "NL", "PH", "US"}
CAPITAL_TEMPLATES = ("What is the capital of {}?", "Name the capital city of {}.")
CURRENCY_TEMPLATES = ("What is the currency of {} called?", "Which currency do people in {} pay with?")
CONTINENT_TEMPLATES = ("On which continent is {}?", "Which continent does {} belong to?")


def read_question_set(name: str) -> list[dict[str, Any]]:
    """Generate the rows of a named set.

    Args:
        name: name of the set, a key of `SETS`.

    Returns:
        Rows with the fields question, answers, source, kind and group.
    """
    return SETS[name]()


def _countries() -> list[dict[str, Any]]:
    """Ask for the capital, currency and continent of each country with at least `MIN_POPULATION` people.

    Questions that contain their own answer are omitted.
    """
    countries = json.loads(fetch_asset("countries").read_text()).values()
    large = (c for c in countries if c["population"] >= MIN_POPULATION and c["iso"] not in EXCLUDED)
    chosen = sorted(large, key=lambda c: c["name"])
    rows: list[dict[str, Any]] = []
    for number, country in enumerate(chosen):
        iso, bare = country["iso"], country["name"].removeprefix("The ")
        name = f"the {bare}" if iso in NAMED_WITH_ARTICLE else bare
        variant = number % 2
        rows.append(
            _build_row(
                CAPITAL_TEMPLATES[variant].format(name),
                _list_spellings(country["capital"], *CAPITALS.get(iso, ())),
                "capitals",
                iso,
            )
        )
        currency = (country["currencyname"], *CURRENCIES.get(country["currencyname"], ()))
        rows.append(
            _build_row(CURRENCY_TEMPLATES[variant].format(name), [*currency, *(f"{c}s" for c in currency)], "currencies", iso)
        )
        if iso not in TRANSCONTINENTAL:
            rows.append(
                _build_row(
                    CONTINENT_TEMPLATES[variant].format(name), list(CONTINENTS[country["continentcode"]]), "continents", iso
                )
            )
    return [row for row in rows if not _contains_answer(row)]


def _build_row(question: str, answers: list[str], source: str, group: str) -> dict[str, Any]:
    return {"question": question, "answers": answers, "source": source, "kind": "contains", "group": group}


def _list_spellings(*names: str) -> list[str]:
    """Return the names, and hyphenated names also with spaces."""
    return list(dict.fromkeys(spelling for name in names for spelling in (name.strip(), name.strip().replace("-", " "))))


def _contains_answer(row: dict[str, Any]) -> bool:
    question = f" {normalize_answer(row['question'])} "
    return any(f" {normalize_answer(answer)} " in question for answer in row["answers"])


SETS: dict[str, Callable[[], list[dict[str, Any]]]] = {"countries": _countries}

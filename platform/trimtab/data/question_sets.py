"""The question sets that trimtab knows by name, made of facts of the catalogue in our own words."""

import json
from collections.abc import Callable
from typing import Any

from trimtab.assets.download import fetch_asset
from trimtab.text.normalization import normalize_answer

POPULATION = 1_000_000
# Not a country any more; contested or moved capitals; a currency of yesterday.
LEFT_OUT = {"CS", "IL", "PS", "GQ", "ZW"}
BETWEEN_CONTINENTS = {"AM", "AZ", "CY", "EG", "GE", "KZ", "RU", "TL", "TR"}
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
CAPITAL_ASKS = ("What is the capital of {}?", "Name the capital city of {}.")
CURRENCY_ASKS = ("What is the currency of {} called?", "Which currency do people in {} pay with?")
CONTINENT_ASKS = ("On which continent is {}?", "Which continent does {} belong to?")


def read_question_set(name: str) -> list[dict[str, Any]]:
    """Rows of a named set, with the fields that question files have."""
    return SETS[name]()


def _countries() -> list[dict[str, Any]]:
    """Capital, currency and continent of each country with a million people; no question that holds its own answer."""
    known = json.loads(fetch_asset("countries").read_text()).values()
    chosen = sorted((c for c in known if c["population"] >= POPULATION and c["iso"] not in LEFT_OUT), key=lambda c: c["name"])
    rows: list[dict[str, Any]] = []
    for number, country in enumerate(chosen):
        iso, bare = country["iso"], country["name"].removeprefix("The ")
        name = f"the {bare}" if iso in NAMED_WITH_ARTICLE else bare
        turn = number % 2
        rows.append(
            _build_row(
                CAPITAL_ASKS[turn].format(name), _list_spellings(country["capital"], *CAPITALS.get(iso, ())), "capitals", iso
            )
        )
        currency = (country["currencyname"], *CURRENCIES.get(country["currencyname"], ()))
        rows.append(_build_row(CURRENCY_ASKS[turn].format(name), [*currency, *(f"{c}s" for c in currency)], "currencies", iso))
        if iso not in BETWEEN_CONTINENTS:
            rows.append(
                _build_row(CONTINENT_ASKS[turn].format(name), list(CONTINENTS[country["continentcode"]]), "continents", iso)
            )
    return [row for row in rows if not _is_given_away(row)]


def _build_row(question: str, answers: list[str], source: str, group: str) -> dict[str, Any]:
    return {"question": question, "answers": answers, "source": source, "kind": "contains", "group": group}


def _list_spellings(*names: str) -> list[str]:
    """Names, and those with hyphens also without."""
    return list(dict.fromkeys(spelled for name in names for spelled in (name.strip(), name.strip().replace("-", " "))))


def _is_given_away(row: dict[str, Any]) -> bool:
    asked = f" {normalize_answer(row['question'])} "
    return any(f" {normalize_answer(answer)} " in asked for answer in row["answers"])


SETS: dict[str, Callable[[], list[dict[str, Any]]]] = {"countries": _countries}

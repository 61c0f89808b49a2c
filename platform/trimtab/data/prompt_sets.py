"""The prompt sets that trimtab knows by name: those of the catalogue, and the project's own."""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import yaml

from trimtab.assets import download
from trimtab.data.prompt import Prompt
from trimtab.errors import NotFoundError
from trimtab.types import LABELS, Label

COUNTRY_QUESTIONS = (
    "What is the capital of {name}?",
    "Tell me which currency is used in {name}.",
    "On which continent is {name}?",
    "Name the capital city of {name}.",
)


def read(name: str, label: Label | None = None) -> list[Prompt]:
    """Prompts of a named set; with `label`, only those of its side (harmful or benign)."""
    reader = SETS.get(name)
    if reader is None:
        raise NotFoundError(f"no prompt set trimtab:{name}; there are: {', '.join(f'trimtab:{n}' for n in SETS)}")
    prompts = reader()
    return [p for p in prompts if label is None or (p.label == "harmful") == (label == "harmful")]


def _advbench() -> list[Prompt]:
    seeds = yaml.safe_load(download.fetch("advbench").read_text())["seeds"]
    return [_row(seed["value"], "harmful", "advbench") for seed in seeds]


def _harmbench() -> list[Prompt]:
    lines = download.fetch("harmbench").read_text().splitlines()
    return [_row(line, "harmful", "harmbench") for line in lines if line.strip()]


def _pairs() -> list[Prompt]:
    prompts: list[Prompt] = []
    for name in ("pairs-50", "pairs-100"):
        for pair in json.loads(download.fetch(name).read_text()):
            group = f"{name}:{pair['id']}"
            prompts.append(_row(_question(pair["text"]), "benign_hard", "pairs", group))
            prompts.append(_row(_question(pair["harmful_version"]), "harmful", "pairs", group))
    return prompts


def _scary() -> list[Prompt]:
    rows: list[dict[str, Any]] = []
    for name in ("scary-80", "scary-70"):
        rows += json.loads(download.fetch(name).read_text())
    return [_row(row["text"], "benign_hard", "scary") for row in rows]


def _countries() -> list[Prompt]:
    countries = json.loads(download.fetch("countries").read_text())
    names = sorted(c["name"] for c in countries.values())
    return [
        _row(COUNTRY_QUESTIONS[i % len(COUNTRY_QUESTIONS)].format(name=name), "benign_easy", "countries", name)
        for i, name in enumerate(names)
    ]


def _own(file: str) -> Callable[[], list[Prompt]]:
    def read_own() -> list[Prompt]:
        text = (files("trimtab.data") / "prompts" / f"{file}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return [_row(r["prompt"], r["class"], file, f"{file}:{r['pair']}" if "pair" in r else None) for r in rows]

    return read_own


SETS: dict[str, Callable[[], list[Prompt]]] = {
    "advbench": _advbench,
    "harmbench": _harmbench,
    "pairs": _pairs,
    "scary": _scary,
    "countries": _countries,
    "contrast": _own("contrast"),
    "plain": _own("plain"),
}


def _row(text: str, label: str, source: str, group: str | None = None) -> Prompt:
    known: Label = next(known for known in LABELS if known == label)
    return Prompt(prompt=text.strip(), label=known, source=source, group=group or text.strip().lower())


def _question(text: str) -> str:
    """The prompt of a text that holds a prompt and its answer."""
    return text.split("\n\n")[0]

"""Named prompt sets: downloaded assets of the catalog and sets packaged with trimtab."""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import yaml

from trimtab.assets.download import fetch_asset
from trimtab.data.prompt import Prompt
from trimtab.errors import NotFoundError
from trimtab.types import LABELS, Label

COUNTRY_QUESTIONS = (
    "What is the capital of {name}?",
    "Tell me which currency is used in {name}.",
    "On which continent is {name}?",
    "Name the capital city of {name}.",
)


def read_prompt_set(name: str, label: Label | None = None) -> list[Prompt]:
    """Read the prompts of a named set.

    Args:
        name: name of the set, without `trimtab:`.
        label: keep only the prompts on the same side (harmful or benign) as this class. None keeps all.

    Raises:
        NotFoundError: if the set is unknown.
    """
    reader = SETS.get(name)
    if reader is None:
        raise NotFoundError(f"no prompt set trimtab:{name}; there are: {', '.join(f'trimtab:{n}' for n in SETS)}")
    prompts = reader()
    return [p for p in prompts if label is None or (p.label == "harmful") == (label == "harmful")]


def _advbench() -> list[Prompt]:
    seeds = yaml.safe_load(fetch_asset("advbench").read_text())["seeds"]
    return [_build_row(seed["value"], "harmful", "advbench") for seed in seeds]


def _harmbench() -> list[Prompt]:
    lines = fetch_asset("harmbench").read_text().splitlines()
    return [_build_row(line, "harmful", "harmbench") for line in lines if line.strip()]


def _pairs() -> list[Prompt]:
    prompts: list[Prompt] = []
    for name in ("pairs-50", "pairs-100"):
        for pair in json.loads(fetch_asset(name).read_text()):
            group = f"{name}:{pair['id']}"
            prompts.append(_build_row(_question(pair["text"]), "benign_hard", "pairs", group))
            prompts.append(_build_row(_question(pair["harmful_version"]), "harmful", "pairs", group))
    return prompts


def _scary() -> list[Prompt]:
    rows: list[dict[str, Any]] = []
    for name in ("scary-80", "scary-70"):
        rows += json.loads(fetch_asset(name).read_text())
    return [_build_row(row["text"], "benign_hard", "scary") for row in rows]


def _countries() -> list[Prompt]:
    countries = json.loads(fetch_asset("countries").read_text())
    names = sorted(c["name"] for c in countries.values())
    return [
        _build_row(COUNTRY_QUESTIONS[i % len(COUNTRY_QUESTIONS)].format(name=name), "benign_easy", "countries", name)
        for i, name in enumerate(names)
    ]


def _read_packaged(file: str) -> Callable[[], list[Prompt]]:
    def read() -> list[Prompt]:
        text = (files("trimtab.data") / "prompts" / f"{file}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return [_build_row(r["prompt"], r["class"], file, f"{file}:{r['pair']}" if "pair" in r else None) for r in rows]

    return read


def _guard() -> list[Prompt]:
    return [prompt for name, read in SETS.items() if name not in (GUARD, UNSEEN) for prompt in read()]


# All labeled prompts of the project for training, the data of a guard.
GUARD = "guard"
# Test prompts, whose kinds and words do not occur in the training sets.
UNSEEN = "unseen"
SETS: dict[str, Callable[[], list[Prompt]]] = {
    "advbench": _advbench,
    "harmbench": _harmbench,
    "pairs": _pairs,
    "scary": _scary,
    "countries": _countries,
    "contrast": _read_packaged("contrast"),
    "plain": _read_packaged("plain"),
    "everyday": _read_packaged("everyday"),
    UNSEEN: _read_packaged(UNSEEN),
    GUARD: _guard,
}


def _build_row(text: str, label: str, source: str, group: str | None = None) -> Prompt:
    typed_label: Label = next(other for other in LABELS if other == label)
    return Prompt(prompt=text.strip(), label=typed_label, source=source, group=group or text.strip().lower())


def _question(text: str) -> str:
    """Return the prompt of a text that contains a prompt and its answer, separated by a blank line."""
    return text.split("\n\n")[0]

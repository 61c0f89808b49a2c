"""From prompt sources to rows that may teach: read, split, balance form, fetch targets, filter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trimtab import objectives
from trimtab.cli.console import say
from trimtab.data import hard_filter as filters
from trimtab.data import prompt as rows
from trimtab.data import question_form
from trimtab.data.hard_filter import Context, Filtered, Row
from trimtab.data.prompt import Prompt
from trimtab.data.readers import read_all
from trimtab.errors import UsageError
from trimtab.jobs.align import targets
from trimtab.jobs.align.config import AlignConfig, DataConfig
from trimtab.jobs.runtime.config import sources
from trimtab.model import chat_template
from trimtab.model.base_model import BaseModel
from trimtab.types import Label, Part

# Neutral system messages in our own words: a prefix must work beside the request's own.
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in plain English.",
    "You work for a small company and talk to its customers. Be friendly and brief.",
    "You are a careful assistant who explains things step by step.",
    "Answer the user's question.",
    "You are a knowledgeable tutor.",
)


@dataclass(frozen=True)
class Given:
    """Prompts by part, those that no row may resemble, and the inputs with their digests."""

    parts: dict[Part, list[Prompt]]
    kept_out: list[str]
    inputs: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """Rows to train and validate on, prompts to validate and test answers on, and how they came about."""

    train: list[Row]
    validation: list[Row]
    parts: dict[Part, list[Prompt]]
    filtered: Filtered
    form: tuple[float, float]
    inputs: list[dict[str, Any]]


def read(config: AlignConfig, base: BaseModel) -> Given:
    """All that is read before anything is asked of a cluster.

    Raises UsageError for prompts that cannot be read or are too few, and for a place that the chat template does not have.
    """
    chat_template.renderer(base, config.rows).mark([{"role": "user", "content": "x"}], config.place, ())
    data = config.data
    parts, inputs = _split(data)
    kept_out = [p.prompt for p in read_all(sources(data.keep_out), "benign_hard", data.columns)]
    return Given(parts, kept_out, inputs)


def prepare(config: AlignConfig, base: BaseModel, given: Given) -> Prepared:
    """Everything that training needs; samples missing targets on the cluster.

    Raises UsageError where the hard filter leaves nothing.
    """
    form_before = question_form.predictability(given.parts["train"])
    parts = _balanced(given.parts, config.data) if config.data.balance_form else given.parts
    with_system = {part: _own_system(prompts, config) for part, prompts in parts.items() if part != "test"}
    filled = targets.fill(config, base, with_system["train"] + with_system["validation"], wants_rejected(config))
    count = len(with_system["train"])
    validate_on, test_on = ([p.prompt for p in parts[part]] for part in ("validation", "test"))
    rules, seed = config.data.rules, config.data.seed
    filtered = filters.hard_filter(filled[:count], rules, Context(seed, given.kept_out, [*validate_on, *test_on]))
    checked = filters.hard_filter(filled[count:], rules, Context(seed, given.kept_out, test_on))
    validation = in_turns(checked.rows)
    form_after = question_form.predictability([row.prompt for row in filtered.rows])
    say(
        f"hard filter: {count} -> {len(filtered.rows)} rows; form alone tells the class with balanced accuracy "
        f"{form_before:.2f} -> {form_after:.2f}"
    )
    check_left(filtered, "train")
    check_left(checked, "validate")
    return Prepared(filtered.rows, validation, parts, filtered, (form_before, form_after), given.inputs)


def identity(config: AlignConfig, base: BaseModel, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that a run must share with the one that it goes on with: settings, the model's weights, and what its sources held;
    as it is read back from JSON."""
    whole = config.identity() | {"fingerprint": base.fingerprint, "inputs": [dict(entry) for entry in inputs]}
    return json.loads(json.dumps(whole))


def in_turns(validation: Sequence[Row]) -> list[Row]:
    """Harmful and benign rows in turns, each side in an order of chance that stays: any first part of them judges both."""
    order = sorted(validation, key=lambda row: rows.fraction(f"{row.prompt.prompt}|{row.prompt.system}", 0))
    sides = [[row for row in order if (row.prompt.label == "harmful") == harmful] for harmful in (True, False)]
    return [row for pair in zip_longest(*sides) for row in pair if row is not None]


def each(configs: Mapping[str, AlignConfig], base: BaseModel) -> dict[str, Prepared]:
    """What `prepare` makes of each; those with the same data and needs share it."""
    done: dict[str, Prepared] = {}
    shared: dict[str, Prepared] = {}
    for name, config in configs.items():
        needs = [asdict(config.data), asdict(config.targets), config.train.longest, config.train.precision]
        key = json.dumps([*needs, wants_rejected(config)], sort_keys=True)
        shared[key] = done[name] = shared.get(key) or prepare(config, base, read(config, base))
    return done


def wants_rejected(config: AlignConfig) -> bool:
    """Whether the objective learns from answers that are not wanted, too."""
    return "rejected" in objectives.get(config.objective)(**config.objective_options).needs


def write(prepared: Prepared, folder: Path) -> None:
    """Keep the filter's table, what it removed, and the parts beside the run."""
    (folder / "filter.json").write_text(json.dumps(table(prepared), indent=2) + "\n")
    (folder / "removed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in removed(prepared)))
    for part, prompts in prepared.parts.items():
        rows.write(prompts, folder / f"{part}.jsonl")


def table(prepared: Prepared) -> dict[str, Any]:
    """The filter's table, and how well form alone tells the class before and after."""
    steps = [asdict(step) for step in prepared.filtered.table]
    return {"table": steps, "form_before": prepared.form[0], "form_after": prepared.form[1]}


def removed(prepared: Prepared) -> list[dict[str, str]]:
    """Every row that a rule took out."""
    return [{"rule": rule, **_shown(row)} for rule, row in prepared.filtered.removed]


def check_left(filtered: Filtered, what: str) -> None:
    """Raise UsageError with the rule that took the last rows, where it left none to `what` on."""
    if not filtered.rows:
        last = next(step.rule for step in filtered.table if not any(step.left.values()))
        raise UsageError(
            f"the hard filter left no rows to {what} on, after {last}: look at data.rules, or give more and clearer rows"
        )


def _balanced(parts: Mapping[Part, list[Prompt]], data: DataConfig) -> dict[Part, list[Prompt]]:
    return {part: question_form.balance(prompts, data.seed) for part, prompts in parts.items()}


def _split(data: DataConfig) -> tuple[dict[Part, list[Prompt]], list[dict[str, Any]]]:
    everything: list[Prompt] = []
    inputs: list[dict[str, Any]] = []
    sides: dict[Label, list[str] | str] = {"harmful": data.harmful, "benign_hard": data.benign}
    for label, given in sides.items():
        side: list[Prompt] = []
        for source in sources(given):
            prompts = [p for p in read_all([source], label, data.columns) if (p.label == "harmful") == (label == "harmful")]
            inputs.append({"name": source, "digest": rows.digest(prompts), "rows": len(prompts)})
            side += prompts
        if data.limit:
            side = sorted(side, key=lambda p: rows.fraction(p.prompt, data.seed))[: data.limit]
        everything += side
    return rows.split(everything, data.validation, data.test, data.seed), inputs


def _shown(row: Row) -> dict[str, str]:
    prompt = row.prompt
    return {"prompt": prompt.prompt, "class": prompt.label, "source": prompt.source, "target": row.target}


def _own_system(prompts: Sequence[Prompt], config: AlignConfig) -> list[Prompt]:
    """Give a share of the prompts a system message of their own."""
    given: list[Prompt] = []
    for prompt in prompts:
        at = rows.fraction(f"system|{prompt.prompt}", config.data.seed)
        if prompt.system is None and at < config.data.own_system:
            system = SYSTEMS[int(at / config.data.own_system * len(SYSTEMS))]
            given.append(replace(prompt, system=system))
        else:
            given.append(prompt)
    return given
